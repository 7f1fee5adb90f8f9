"""A Kaggle of one account on the loopback, for the real command line client: data sets, kernels, submissions.

The client reaches it as its HTTP proxy, so that no address in it has to change. What it answers was read in the
client's sources (kaggle 2.2.5, kagglesdk); the live site was not asked.
"""

import contextlib
import http.server
import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

OWNER = "someone"
SETTINGS = """\
user: INSERT_KAGGLE_NAME_HERE
ensemble: conf/ensemble_tiny.yaml
train:
  data_sets:
    - INSERT_KAGGLE_NAME_HERE/kutils-training-data
    - INSERT_KAGGLE_NAME_HERE/kutils-pretrained
  kernels: []
  parameters: {model: vit_large_24gb, fold: 0, overrides: datasets=cc3m max_local_batch_size=4, hours: 11.5}
"""  # kaggle.yaml as it comes: a user changes the repository's own
TOKEN = "KGAT_0123456789abcdef0123456789abcdef"  # no secret, but nothing may show it


class Refusal(Exception):
    """An answer with an HTTP status of 400 or more."""

    def __init__(self, status: int, message: str = ""):
        super().__init__(message)
        self.status = status


@dataclass
class Dataset:
    """A data set: its request to be made, the files of each version, and how long Kaggle works on the last one."""

    request: dict
    versions: list[dict[str, bytes]]
    notes: list[str] = field(default_factory=list)
    polls_left: int = 0


@dataclass
class Kaggle:
    """State of the stub, and switches for what shall go wrong.

    Attributes:
        requests: (method, body, Authorization header) of every call, in order.
        dataset_polls: how often a new version is `blobs_received` before it is ready.
        absent_status: HTTP status for a data set that is not there.
        dataset_error, push_error: what the service answers in place of a result.
        processing_fails: data sets end as `failed`.
        upload_status: HTTP status of an upload of a file.
        extra_push_answer: keys that are added to the answer of a push.
        held: keys of the kernel's metadata that are reported otherwise than they were pushed.
        held_for: how often; None for always.
        run_states: what the kernel's run goes through, the last one for ever; with `failure_message`.
        outputs: files that the run has written, and `log`.
        submission_answer: in place of a success.
        answers: HTTP status and message for single methods, each used up by one call.
    """

    requests: list = field(default_factory=list)
    datasets: dict[str, Dataset] = field(default_factory=dict)
    blobs: dict[str, tuple] = field(default_factory=dict)
    kernels: dict[str, list[dict]] = field(default_factory=dict)
    submissions: list = field(default_factory=list)
    account_known: bool = True
    dataset_polls: int = 2
    absent_status: int = 404
    dataset_error: str = ""
    processing_fails: bool = False
    upload_status: int = 200
    invalid_tags: tuple = ()
    push_error: str = ""
    extra_push_answer: dict = field(default_factory=dict)
    held: dict = field(default_factory=dict)
    held_for: int | None = None
    run_states: list = field(default_factory=lambda: ["QUEUED", "RUNNING", "COMPLETE"])
    failure_message: str = ""
    outputs: dict[str, bytes] = field(default_factory=dict)
    log: str = ""
    submission_answer: dict | None = None
    answers: dict[str, list] = field(default_factory=dict)

    def called(self, method: str) -> list[dict]:
        """Bodies of all calls of a method."""
        return [body for name, body, _ in self.requests if name == method]

    def add_dataset(self, ref: str) -> Dataset:
        """A data set that is there, and ready, before the client comes."""
        self.datasets[ref] = Dataset({}, [{"old.txt": b"old"}])
        return self.datasets[ref]

    def answer(self, method: str, body: dict, authorization: str) -> dict:
        """What a method of the service answers."""
        self.requests.append((method, body, authorization))
        if self.answers.get(method):
            status, message = self.answers[method].pop(0)
            raise Refusal(status, message.format(authorization=authorization))
        return getattr(self, method)(body)

    def IntrospectToken(self, body):
        return {"active": self.account_known and body["token"] == TOKEN, "username": OWNER}

    def dataset_of(self, body) -> Dataset:
        ref = f"{body['ownerSlug']}/{body['datasetSlug']}"
        if ref not in self.datasets:
            raise Refusal(self.absent_status)
        return self.datasets[ref]

    def GetDatasetStatus(self, body):
        dataset = self.dataset_of(body)
        if dataset.polls_left:
            dataset.polls_left -= 1
            return {"status": "BLOBS_RECEIVED" if len(dataset.versions) == 1 else "READY"}
        return {"status": "FAILED" if self.processing_fails else "READY"}

    def GetDataset(self, body):
        dataset = self.dataset_of(body)
        return {"currentVersionNumber": len(dataset.versions) - bool(dataset.polls_left and dataset.notes)}

    def StartBlobUpload(self, body):
        token = f"blob-{len(self.blobs)}"
        self.blobs[token] = (body["name"], b"")
        return {"token": token, "createUrl": f"http://localhost/upload/{token}?X-Goog-Signature=5161"}

    def received(self, body) -> dict[str, bytes]:
        return dict(self.blobs[file["token"]] for file in body.get("files", []))

    def dataset_answer(self, ref: str) -> dict:
        answer = {"ref": ref, "url": f"https://www.kaggle.com/datasets/{ref}", "status": "ok"}
        answer |= {"status": "error", "error": self.dataset_error} if self.dataset_error else {}
        return answer | {"invalidTags": list(self.invalid_tags)}

    def CreateDataset(self, body):
        ref = f"{body['ownerSlug']}/{body['slug']}"
        if not self.dataset_error:
            self.datasets[ref] = Dataset(body, [self.received(body)], polls_left=self.dataset_polls)
        return self.dataset_answer(ref)

    def CreateDatasetVersion(self, body):
        dataset = self.dataset_of(body)
        if not self.dataset_error:
            dataset.versions.append(self.received(body["body"]))
            dataset.notes.append(body["body"]["versionNotes"])
            dataset.polls_left = self.dataset_polls
        return self.dataset_answer(f"{body['ownerSlug']}/{body['datasetSlug']}")

    def SaveKernel(self, body):
        ref = body["slug"]
        if self.push_error:
            return {"error": self.push_error}
        self.kernels.setdefault(ref, []).append(body)
        answer = {"ref": ref, "url": f"https://www.kaggle.com/code/{ref}", "versionNumber": len(self.kernels[ref])}
        return answer | self.extra_push_answer

    def kernel_of(self, body) -> dict:
        ref = f"{body['userName']}/{body['kernelSlug']}"
        if ref not in self.kernels:
            raise Refusal(403, "Permission 'kernels.get' was denied")
        return self.kernels[ref][-1]

    def GetKernel(self, body):
        saved = self.kernel_of(body)
        same = ("language", "kernelType", "isPrivate", "enableGpu", "enableInternet", "machineShape")
        same += ("datasetDataSources", "competitionDataSources", "kernelDataSources", "modelDataSources")
        metadata = {"ref": saved["slug"], "id": 7, "title": saved["newTitle"]}
        metadata |= {key: saved[key] for key in same if key in saved}
        if self.held_for != 0:
            metadata |= self.held
        self.held_for = self.held_for and self.held_for - 1
        blob = {"source": saved["text"], "language": "python", "kernelType": "notebook", "slug": body["kernelSlug"]}
        return {"metadata": metadata, "blob": blob}

    def GetKernelSessionStatus(self, body):
        self.kernel_of(body)
        state = self.run_states.pop(0) if len(self.run_states) > 1 else self.run_states[0]
        return {"status": state} | ({"failureMessage": self.failure_message} if state == "ERROR" else {})

    def ListKernelSessionOutput(self, body):
        """One file per page, so that the client has to ask for all pages."""
        self.kernel_of(body)
        number, names = int(body.get("pageToken") or 0), sorted(self.outputs)
        files = [{"fileName": name, "url": f"http://localhost/output/{name}"} for name in names[number : number + 1]]
        more = {"nextPageToken": str(number + 1)} if number + 1 < len(names) else {}
        return {"files": files, "log": self.log} | more

    def CreateCodeSubmission(self, body):
        if self.submission_answer is not None:
            return self.submission_answer
        self.submissions.append(body)
        return {"message": "Successfully submitted to The Comp\u00e9tition", "ref": 4711}

    def GetSubmissionLimits(self, body):
        return {"numAllowedNow": 4}


class Handler(http.server.BaseHTTPRequestHandler):
    """Takes absolute addresses, as a proxy does, whatever their host."""

    kaggle: Kaggle

    def do_POST(self):
        body = json.loads(self.body() or b"{}")
        try:
            answer = self.kaggle.answer(self.path.rpartition("/")[2], body, self.headers.get("Authorization", ""))
            self.send(200, json.dumps(answer).encode())
        except Refusal as refusal:
            content = {"code": refusal.status, "message": str(refusal)} if str(refusal) else {}
            self.send(refusal.status, json.dumps(content).encode())
        except Exception as error:  # the client would try again for minutes if there were no answer
            self.send(500, json.dumps({"code": 500, "message": f"the stub failed: {error!r}"}).encode())

    def do_PUT(self):
        token = urlsplit(self.path).path.rpartition("/")[2]
        name, _ = self.kaggle.blobs[token]
        self.kaggle.blobs[token] = (name, self.body())
        self.send(self.kaggle.upload_status, b"")

    def do_GET(self):
        name = urlsplit(self.path).path.partition("/output/")[2]
        self.send(200, self.kaggle.outputs[name])

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serve():
    """Run a stub; gives its state and its address."""
    kaggle = Kaggle()
    handler = type("StubHandler", (Handler,), {"kaggle": kaggle})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield kaggle, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def environment(address: str, home: Path) -> dict[str, str | None]:
    """Variables that send the client to the stub with a token, and keep it from all of the user's; None: taken away."""
    settings = dict.fromkeys(name for name in os.environ if name.startswith(("KAGGLE_", "VERBOSE")))
    settings |= {"KAGGLE_API_ENVIRONMENT": "LOCALHOST", "KAGGLE_API_TOKEN": TOKEN}
    settings |= dict.fromkeys(("http_proxy", "HTTP_PROXY"), address)
    settings |= dict.fromkeys(("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    settings |= dict.fromkeys(("no_proxy", "NO_PROXY"), "")
    return settings | dict.fromkeys(("HOME", "KAGGLE_CONFIG_DIR", "XDG_CONFIG_HOME", "TMPDIR"), str(home))
