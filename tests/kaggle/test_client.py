"""Data sets, kernels and submissions through Kaggle's own client, which speaks to a stub of Kaggle on this machine."""

import contextlib
import importlib.util
import io
import json
import os
import sys
import zipfile

import pytest
from fixtures import kaggle_stub
from fixtures.kaggle_stub import OWNER, TOKEN

from kutils.kaggle import api, client, metadata
from kutils.kaggle.metadata import KaggleError

absent = importlib.util.find_spec("kaggle") is None and not os.environ.get("CI")  # there it has to be installed
needs_client = pytest.mark.skipif(absent, reason="pip install kaggle six")
DATASET = f"{OWNER}/kutils-code"
KERNEL = f"{OWNER}/kutils-submission"
FAST = {"wait_seconds": 60, "poll_seconds": 0.05}
SHORT = {"wait_seconds": 0.1, "poll_seconds": 0.05}


@pytest.fixture(autouse=True)
def no_client(monkeypatch):
    """A test that does not ask for the stub must not import the client."""
    monkeypatch.setitem(sys.modules, "kaggle", None)


@pytest.fixture
def stub(tmp_path_factory, monkeypatch, capsys, no_client):
    """The state of a stub that the client speaks to; nothing that is printed may show the token."""
    home = tmp_path_factory.mktemp("home")
    with kaggle_stub.serve() as (state, address):
        kaggle_stub.send_client_here(monkeypatch, address, home)
        state.home = home
        yield state
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err


@contextlib.contextmanager
def refused(*parts):
    """A KaggleError that says all the parts, and not the token."""
    with pytest.raises(KaggleError) as caught:
        yield
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert TOKEN not in message


@pytest.fixture
def folder(tmp_path):
    """A folder to upload: a sub-folder with a sub-folder, a folder, and a file."""
    root = tmp_path / "upload"
    (root / "kutils" / "inner").mkdir(parents=True)
    (root / "conf").mkdir()
    (root / "kutils" / "a.py").write_text("A = 1\n")
    (root / "kutils" / "inner" / "b.py").write_text("B = 2\n")
    (root / "conf" / "c.yaml").write_text("c: 3\n")
    (root / "notes.txt").write_text("four")
    describe(root)
    return root


def describe(root, **changes):
    values = {"id": DATASET, "title": "kutils code", "licenses": [{"name": "MIT"}]} | changes
    (root / "dataset-metadata.json").write_text(json.dumps(values))


@pytest.fixture
def kernel(tmp_path):
    """Make the folder of a kernel, beside its notebook; keyword arguments change its metadata, None takes away."""
    (tmp_path / "notebooks").mkdir()
    cell = {"cell_type": "code", "source": ["1 +\n", "1"], "outputs": [{"x": 1}], "metadata": {}}
    content = {"cells": [cell], "metadata": {"kernelspec": {"name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "notebooks" / "submission.ipynb").write_text(json.dumps(content))

    def make(**changes):
        values = {
            "id": KERNEL,
            "title": "kutils submission",
            "code_file": "../notebooks/submission.ipynb",
            "language": "python",
            "kernel_type": "notebook",
            "is_private": "true",
            "enable_gpu": "true",
            "enable_internet": "false",
            "machine_shape": "NvidiaTeslaT4",
            "dataset_sources": [f"{OWNER}/kutils-code", f"{OWNER}/kutils-weights"],
            "competition_sources": ["the-competition"],
            "kernel_sources": [],
            "model_sources": [f"{OWNER}/model/PyTorch/default/1"],
        } | changes
        root = tmp_path / "kernel"
        root.mkdir(exist_ok=True)
        values = {key: value for key, value in values.items() if value is not None}
        (root / "kernel-metadata.json").write_text(json.dumps(values))
        return root

    return make


def unzipped(content: bytes) -> dict[str, str]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


# data sets


@needs_client
@pytest.mark.parametrize("absent", [403, 404])
def test_a_new_data_set_holds_what_the_folder_holds(stub, folder, capsys, absent):
    stub.absent_status = absent
    client.upload_dataset(folder, "first", **FAST)
    made = stub.datasets[DATASET]
    assert made.request["isPrivate"] is True and made.request["licenseName"] == "MIT"
    assert made.request["title"] == "kutils code"
    files = made.versions[0]
    assert set(files) == {"kutils.zip", "conf.zip", "notes.txt"} and files["notes.txt"] == b"four"
    assert unzipped(files["kutils.zip"]) == {"a.py": "A = 1\n", "inner/b.py": "B = 2\n"}
    assert unzipped(files["conf.zip"]) == {"c.yaml": "c: 3\n"}
    assert made.polls_left == 0  # it has waited
    assert capsys.readouterr().out.splitlines()[-1] == f"data set {DATASET}: ready"


@needs_client
def test_a_version_replaces_the_content_and_is_waited_for(stub, folder, capsys):
    """Kaggle says `ready` of the previous version until the new one is processed."""
    known = stub.add_dataset(DATASET)
    client.upload_dataset(folder, "--quiet", **FAST)  # a message like an option
    assert set(known.versions[1]) == {"kutils.zip", "conf.zip", "notes.txt"}
    assert known.notes == ["--quiet"]
    assert known.polls_left == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"data set {DATASET}: in process", f"data set {DATASET}: ready"]
    assert not stub.called("CreateDataset")


@needs_client
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("switches", "said"),
    [
        ({"dataset_error": "the quota is used up"}, "the quota is used up"),
        ({"invalid_tags": ("nonsense",)}, "not valid tags: nonsense"),
    ],
)
def test_a_refusal_that_is_no_error_of_the_client(stub, folder, switches, said, known):
    vars(stub).update(switches)
    if known:
        stub.add_dataset(DATASET)
    with refused(DATASET, said):
        client.upload_dataset(folder, "first", **FAST)


@needs_client
def test_what_the_client_leaves_out(stub, folder):
    """What the checks before the upload miss is seen in what the client prints, or does not print."""
    (folder / "kernel-metadata.json").touch()  # without a word
    with refused("kernel-metadata.json did not arrive"):
        client.upload_dataset(folder, "second", **FAST)


@needs_client
def test_a_refusal_without_a_reason_is_an_error(stub, folder, kernel, monkeypatch):
    monkeypatch.setattr(kaggle_stub.Kaggle, "dataset_answer", lambda *_: {"status": "error"})
    with refused(f"data set {DATASET}: Kaggle gives no reason"):
        client.upload_dataset(folder, "first", **FAST)
    monkeypatch.setattr(kaggle_stub.Kaggle, "SaveKernel", lambda *_: {})
    with refused("Kaggle saved no version and gives no reason"):
        client.push_kernel(kernel(), **FAST)


@needs_client
def test_an_upload_that_the_storage_refuses(stub, folder):
    stub.upload_status = 403
    with refused(f"data set {DATASET}: Upload unsuccessful: "):
        client.upload_dataset(folder, "first", **FAST)
    assert not stub.datasets


@needs_client
def test_a_data_set_that_is_never_ready(stub, folder):
    stub.dataset_polls = 1000
    with refused("is uploaded, but not ready after 0.1 s", f"kaggle datasets status {DATASET}"):
        client.upload_dataset(folder, "first", **SHORT)


@needs_client
def test_a_data_set_that_cannot_be_processed(stub, folder):
    stub.processing_fails, stub.dataset_polls = True, 0
    with refused("Kaggle could not process", f"https://www.kaggle.com/datasets/{DATASET}"):
        client.upload_dataset(folder, "first", **FAST)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"title": "short"}, "title 'short' does not have 6 to 50 characters"),
        ({"title": "x" * 51}, "does not have 6 to 50 characters"),
        ({"id": f"{OWNER}/short"}, "slug of 6 to 50"),
        ({"id": "kutils-code"}, "is not owner/slug"),
        ({"licenses": []}, "not one licence"),
        ({"licenses": [{"name": "MIT"}, {"name": "CC0-1.0"}]}, "not one licence"),
        ({"id_no": 5}, "id_no would be taken"),
        ({"id": "INSERT_KAGGLE_NAME_HERE/kutils-code"}, "in place of INSERT_KAGGLE_NAME_HERE"),
    ],
)
def test_a_data_set_described_wrongly_is_not_sent(folder, changes, said):
    describe(folder, **changes)
    with refused(said, "dataset-metadata.json"):
        client.upload_dataset(folder, "first")


@pytest.mark.parametrize(
    "name",
    ["kaggle.json", "access_token", "kutils/.netrc", "kutils/inner/.env", "kutils/__pycache__/a.pyc", ".git/config"],
)
def test_files_that_do_not_belong_into_a_data_set(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with refused("does not belong into a data set", name.partition("/")[0]):
        client.upload_dataset(folder, "first")


def test_a_data_set_with_nothing_in_it_or_without_a_message(tmp_path):
    (tmp_path / "empty").mkdir()
    with refused("dataset-metadata.json cannot be read"):
        client.upload_dataset(tmp_path, "first")
    describe(tmp_path)
    with refused("there is nothing to upload", "the message is empty"):
        client.upload_dataset(tmp_path, " ")


@pytest.mark.parametrize("name", ["kutils/weights", "weights", "kutils/w.pth", "w.pth", "kutils/inner/w.pth"])
@pytest.mark.parametrize("target", ["weights", "weights/w.pth", "nowhere"])
def test_no_symbolic_link_is_followed(folder, tmp_path, name, target):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.pth").write_text("x")
    (folder / name).symlink_to(tmp_path / target)
    with refused(f"{name} is a symbolic link"):
        client.upload_dataset(folder, "first")


@pytest.mark.parametrize("user", ["a_b", "-a", "a.b", "a b", "caf\u00e9", "", "a\n"])
def test_a_user_that_kaggle_does_not_have(folder, user):
    describe(folder, id=f"{user}/kutils-code")
    with refused("is not owner/slug"):
        client.upload_dataset(folder, "first")


# kernels


@needs_client
def test_a_push_sends_what_the_folder_says(stub, kernel, capsys):
    pushed = client.push_kernel(kernel(), **FAST)
    assert pushed == client.Pushed(KERNEL, 1, f"https://www.kaggle.com/code/{KERNEL}")
    sent = stub.called("SaveKernel")[0]
    assert (sent["enableInternet"], sent["enableGpu"], sent["isPrivate"]) == (False, True, True)
    assert sent["machineShape"] == "NvidiaTeslaT4" and sent["competitionDataSources"] == ["the-competition"]
    assert sent["datasetDataSources"] == [f"{OWNER}/kutils-code", f"{OWNER}/kutils-weights"]
    assert json.loads(sent["text"])["cells"][0]["source"] == "1 +\n1"
    assert capsys.readouterr().out == f"kernel {KERNEL}: saved as described\n"
    assert client.push_kernel(kernel(), **FAST).version == 2


@needs_client
@pytest.mark.parametrize("kind", ["Dataset", "Competition", "Kernel", "Model"])
def test_sources_that_kaggle_does_not_add(stub, kernel, kind):
    stub.extra_push_answer = {f"invalid{kind}Sources": ["someone/missing"]}
    with refused(f"not valid {kind.lower()} sources: someone/missing", "version 1 was saved and runs all the same"):
        client.push_kernel(kernel(), **FAST)


@needs_client
def test_a_push_error_is_an_error(stub, kernel):
    stub.push_error = "Maximum batch GPU session count of 2 reached."
    with refused(f"kernel {KERNEL}: Maximum batch GPU session count of 2 reached."):
        client.push_kernel(kernel(), **FAST)


@needs_client
@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"enableInternet": True}, "enable_internet is True, not False"),
        ({"enableGpu": False}, "enable_gpu is False, not True"),
        ({"isPrivate": False}, "is_private is False, not True"),
        ({"machineShape": "NvidiaTeslaP100"}, "machine_shape is NvidiaTeslaP100, not NvidiaTeslaT4"),
        ({"datasetDataSources": [f"{OWNER}/kutils-code"]}, f"{OWNER}/kutils-weights is not in dataset_sources"),
        ({"competitionDataSources": []}, "the-competition is not in competition_sources"),
        ({"kernelDataSources": [f"{OWNER}/another"]}, f"{OWNER}/another is in kernel_sources unasked"),
        ({"modelDataSources": []}, f"{OWNER}/model/pytorch/default/1 is not in model_sources"),
    ],
)
def test_a_kernel_that_kaggle_holds_otherwise(stub, kernel, held, said):
    stub.held = held
    with refused("version 1 was saved and runs, but not as described", said, f"https://www.kaggle.com/code/{KERNEL}"):
        client.push_kernel(kernel(), **SHORT)


@needs_client
def test_other_spellings_are_no_difference(stub, kernel):
    """Reports of `kernels pull -m` hold such prefixes; the machine is none before the first session."""
    stub.held = {"datasetDataSources": [f"datasets/{OWNER}/Kutils-Weights", f"{OWNER}/kutils-code/3"]}
    stub.held |= {"machineShape": "", "kernelDataSources": [f"code/{OWNER}/other-kernel"]}
    assert client.push_kernel(kernel(kernel_sources=[f"{OWNER}/other-kernel"]), **SHORT).version == 1


@needs_client
def test_a_report_that_lags_behind_is_asked_for_again(stub, kernel, capsys):
    stub.held, stub.held_for = {"machineShape": "None"}, 1
    assert client.push_kernel(kernel(), **FAST).version == 1
    first, last = capsys.readouterr().out.splitlines()
    assert "machine_shape is None, not NvidiaTeslaT4" in first and last.endswith("saved as described")


@needs_client
def test_a_title_that_resolves_to_another_slug(stub, kernel, monkeypatch):
    """The client's own check, should ours pass by it."""
    monkeypatch.setattr(metadata, "slugify", lambda title: "kutils-submission")
    with refused("Your kernel title does not resolve to the specified id", "version 1 was saved"):
        client.push_kernel(kernel(title="something else"), **FAST)
    stub.extra_push_answer = {"url": f"https://www.kaggle.com/code/{KERNEL}-two"}
    with refused(f"elsewhere, at https://www.kaggle.com/code/{KERNEL}-two"):
        client.push_kernel(kernel(), **FAST)


@needs_client
def test_a_retired_machine(stub, kernel):
    with refused("'NvidiaTeslaP100' is retired"):
        client.push_kernel(kernel(machine_shape="NvidiaTeslaP100"), **FAST)


@needs_client
def test_internet_only_if_allowed(stub, kernel):
    assert client.push_kernel(kernel(enable_internet=True), allow_internet=True, **FAST).version == 1
    assert stub.called("SaveKernel")[0]["enableInternet"] is True
    assert client.push_kernel(kernel(enable_internet=None, competition_sources=[]), **FAST).version == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_source": []}, "ignores 'dataset_source'; did you mean 'dataset_sources'?"),
        ({"enable_internett": "false"}, "did you mean 'enable_internet'?"),
        ({"machine_shape": None}, "machine_shape is missing"),
        ({"title": None, "id": None}, "id is missing; title is missing"),
        ({"id": "kutils-submission"}, "is not owner/slug"),
        ({"id": f"{OWNER}/kutils-submission/3"}, "is not owner/slug"),
        ({"title": "kutils, submitted"}, "the title gives the slug 'kutils-submitted'"),
        ({"language": "r"}, "language is 'r', not 'python'"),
        ({"kernel_type": "script"}, "kernel_type is 'script', not 'notebook'"),
        ({"enable_internet": "true"}, "a version with internet cannot be submitted"),
        ({"enable_internet": None}, "a version with internet cannot be submitted"),  # the client's default
        ({"code_file": "no.ipynb"}, "no.ipynb cannot be read: No such file"),
        ({"dataset_sources": ["INSERT_KAGGLE_NAME_HERE/kutils-code"]}, "in place of INSERT_KAGGLE_NAME_HERE"),
    ],
)
def test_a_kernel_described_wrongly_is_not_pushed(kernel, changes, said):
    with refused(said, "kernel-metadata.json"):
        client.push_kernel(kernel(**changes))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("# %%\n1 + 1\n", "is no notebook with metadata.kernelspec.name"),
        ('{"cells": [], "metadata": {}}', "is no notebook with metadata.kernelspec.name"),
        ('{"cells": [], "metadata": {"kernelspec": {"name": ""}}}', "is no notebook with metadata.kernelspec.name"),
        (" " * 1_000_000, "larger than Kaggle takes"),
    ],
)
def test_a_notebook_that_would_not_run_is_not_pushed(kernel, tmp_path, content, said):
    (tmp_path / "notebooks" / "submission.ipynb").write_text(content)
    with refused(said, "submission.ipynb"):
        client.push_kernel(kernel())


@needs_client
def test_slugs_are_those_of_the_client():
    from slugify import slugify  # the client's own

    for title in ("kutils submission", "A/B -- Test_2", "1,000 images, 2 models", " it's (new)! ", "v1.2"):
        assert metadata.slugify(title) == slugify(title)


@pytest.fixture
def pushed(stub):
    """A stub that holds the kernel."""
    stub.kernels[KERNEL] = [{"slug": KERNEL, "newTitle": "kutils submission", "text": "{}"}]
    return stub


@needs_client
def test_waiting_for_a_run_tells_each_change_once(pushed, capsys):
    pushed.run_states = ["QUEUED", "RUNNING", "RUNNING", "COMPLETE"]
    client.wait_for_run(f"{KERNEL}/3", **FAST)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"kernel {KERNEL}/3: {state}" for state in ("queued", "running", "complete")]
    assert {body["versionLabel"] for body in pushed.called("GetKernelSessionStatus")} == {"v3"}


@needs_client
@pytest.mark.parametrize(
    ("state", "message", "said"),
    [
        ("ERROR", 'Notebook Threw\n"Exception"', ['ended: error, Notebook Threw\n"Exception"; see']),
        ("CANCEL_ACKNOWLEDGED", "", ["ended: cancel_acknowledged; see"]),
    ],
)
def test_a_run_that_fails(pushed, state, message, said):
    pushed.run_states, pushed.failure_message = ["RUNNING", state], message
    with refused(*said, f"https://www.kaggle.com/code/{KERNEL}"):
        client.wait_for_run(KERNEL, **FAST)


@needs_client
def test_a_run_that_lasts(pushed):
    pushed.run_states = ["RUNNING"]
    with refused("is not over after 0.1 s, and goes on: wait again"):
        client.wait_for_run(KERNEL, **SHORT)


@needs_client
def test_waiting_outlives_a_service_that_is_down(pushed, capsys):
    pushed.answers = {"GetKernelSessionStatus": [(503, ""), (503, "")], "IntrospectToken": [(502, "")] * 2}
    client.wait_for_run(KERNEL, **FAST)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["no answer, asking again", "queued", "running", "complete"]


@needs_client
def test_a_kernel_that_is_not_there(stub):
    with refused(f"kernel {OWNER}/another: Cannot access kernel"):
        client.wait_for_run(f"{OWNER}/another", **FAST)


@needs_client
def test_output_replaces_a_previous_one_which_stays_as_bak(pushed, tmp_path):
    pushed.outputs = {"submission.csv": b"imgId_eId,val\n", "inner/log.txt": b"x" * 3000, "empty.txt": b""}
    pushed.log = "it ran\n"
    target = tmp_path / "results" / "output"
    names = ["empty.txt", "inner/log.txt", "kutils-submission.log", "submission.csv"]
    assert client.fetch_output(KERNEL, target) == [target / name for name in names]
    assert (target / "submission.csv").read_bytes() == b"imgId_eId,val\n"
    assert (target / "inner" / "log.txt").read_bytes() == b"x" * 3000

    for number in (1, 2):  # the second time there is a .bak already
        (target / "mine.txt").write_text(str(number))
        client.fetch_output(KERNEL, target)
        assert not (target / "mine.txt").exists()
        assert (target.with_name("output.bak") / "mine.txt").read_text() == str(number)
    assert sorted(path.name for path in target.parent.iterdir()) == ["output", "output.bak"]


@needs_client
def test_output_that_does_not_come_leaves_the_previous_one(pushed, tmp_path):
    target = tmp_path / "output"
    target.mkdir()
    (target / "mine.txt").touch()
    with refused(f"{KERNEL} has no output"):
        client.fetch_output(KERNEL, target)
    pushed.outputs = {"../../escaped.txt": b"x"}
    with refused("Refusing to download"):
        client.fetch_output(KERNEL, target)
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
    with refused("is a file"):
        client.fetch_output(KERNEL, target / "mine.txt")


# submissions


@needs_client
def test_a_submission(stub):
    message = client.submit("the-competition", KERNEL, 3, "third try")
    expected = ["Successfully submitted to The Comp\u00e9tition", "submission 4711", "4 submissions are left today"]
    assert message.splitlines() == expected
    assert stub.submissions == [
        {
            "competitionName": "the-competition",
            "kernelOwner": OWNER,
            "kernelSlug": "kutils-submission",
            "kernelVersion": 3,
            "fileName": "submission.csv",
            "submissionDescription": "third try",
        }
    ]


@needs_client
def test_submissions_that_are_not_taken(stub):
    stub.submission_answer = {"message": "You have used all submissions of today"}
    with refused("did not take version 3", "You have used all submissions of today"):
        client.submit("the-competition", KERNEL, 3, "third try")
    stub.answers = {"CreateCodeSubmission": [(400, "Submission not allowed: internet is on"), (404, "")]}
    with refused(f"version 3 of {KERNEL} for the-competition: Submission not allowed: internet is on"):
        client.submit("the-competition", KERNEL, 3, "third try")
    with refused(f"version 3 of {KERNEL} for the-competition: ", "The resource was not found"):
        client.submit("the-competition", KERNEL, 3, "third try")


# the client itself


@needs_client
def test_secrets_are_masked_wherever_they_come_from(stub, monkeypatch):
    """The service repeats the header that it was sent: in an error, and in the message of a success."""
    stub.answers = {"CreateCodeSubmission": [(400, "bad header {authorization}")]}
    with refused("bad header Bearer ***"):
        client.submit("the-competition", KERNEL, 3, f"with {TOKEN}")
    stub.submission_answer = {"message": f"Successfully submitted by {TOKEN}", "ref": 1}
    assert "Successfully submitted by ***" in client.submit("the-competition", KERNEL, 3, "x")

    monkeypatch.delenv("KAGGLE_API_TOKEN")
    (stub.home / ".kaggle").mkdir()
    (stub.home / ".kaggle" / "access_token").write_text(f"{TOKEN}\n")
    assert "Successfully submitted by ***" in client.submit("the-competition", KERNEL, 3, "x")

    (stub.home / ".kaggle" / "access_token").unlink()
    (stub.home / "kaggle.json").write_text(json.dumps({"username": OWNER, "key": "a-key-of-old"}))
    (stub.home / "kaggle.json").chmod(0o600)
    stub.submission_answer = {"message": "Successfully submitted by someone with a-key-of-old", "ref": 1}
    assert "Successfully submitted by someone with ***" in client.submit("the-competition", KERNEL, 3, "x")
    assert stub.requests[-1][2].startswith("Basic ")  # it was that key which the client has used


@needs_client
def test_a_token_that_the_client_renews_is_masked(stub):
    with refused("someone has the ***"), api.signed_in("x"):
        (stub.home / ".kaggle").mkdir()
        content = json.dumps({"access_token": "renewed-token", "username": "someone"})
        (stub.home / ".kaggle" / "credentials.json").write_text(content)
        raise RuntimeError("someone has the renewed-token")


@needs_client
def test_a_client_that_would_show_all_its_traffic(stub, monkeypatch, kernel):
    monkeypatch.setenv("VERBOSE", "1")
    assert client.push_kernel(kernel(), **FAST).version == 1  # what the client shows would be taken for complaints


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("for url: https://x.y/z?a=1&X-Goog-Signature=5161&b=2", "for url: https://x.y/z?a=1&X-Goog-Signature=***&b=2"),
        ("proxy http://me:word@127.0.0.1:8080/x", "proxy http://me:***@127.0.0.1:8080/x"),
        ("see http://127.0.0.1:8080/x@y?scriptVersionId=5", "see http://127.0.0.1:8080/x@y?scriptVersionId=5"),
    ],
)
def test_signatures_and_passwords_of_addresses_are_masked(text, masked):
    assert api.masked(text, set()) == masked


@needs_client
def test_no_account(stub, monkeypatch, folder):
    stub.account_known = False  # a token that has expired
    with refused(
        "Kaggle knows no account of yours",
        "https://www.kaggle.com/settings",
        "KAGGLE_API_TOKEN",
        "~/.kaggle/access_token",
    ):
        client.upload_dataset(folder, "first")
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    with refused("Kaggle knows no account of yours"):
        client.submit("the-competition", KERNEL, 3, "x")


@needs_client
@pytest.mark.parametrize("package", ["kaggle", "kagglesdk", "requests"])
def test_a_client_that_is_not_there_or_lacks_a_package(stub, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with refused(f"{package} is not installed: pip install -U kaggle six"):
        client.submit("the-competition", KERNEL, 3, "x")


@needs_client
def test_a_service_that_never_answers(stub, monkeypatch, folder):
    monkeypatch.setattr(api, "CALL_SECONDS", 0.05)
    stub.delay_seconds = 0.5
    with refused(f"version 3 of {KERNEL} for the-competition: no answer within 0.05 s"):
        client.submit("the-competition", KERNEL, 3, "x")
