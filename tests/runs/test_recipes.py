"""Recipes are read strictly, overrides go through the same checks, and the seed's twelve files are as published."""

import pytest

from kutils.runs import recipes
from kutils.runs.recipes import ConfigError, Recipe, find_recipe, load_recipe, recipe_files
from kutils.system import paths

# the 5th-place solution's file stems: model, stage, folds
PUBLISHED = {
    "convnext_large_3data_input384_bs32_lr1e-4_1e-6_wd5e-2_madgrad_wawrmup3_15epoch": (
        "convnext_large",
        1,
        (0, 1, 2, 3),
    ),
    "vit_large_3data_input336_bs32_lr1e-4_1e-6_wd5e-2_madgrad_wawrmup3_15epoch": ("vit_large", 1, (0, 3, 4, 8)),
    "convnext_xxlarge_3data_input384_bs32_lr1e-4_1e-6_wd5e-2_madgrad_wawrmup1_10epoch": (
        "convnext_xxlarge",
        1,
        (0, 1, 6, 7),
    ),
    "eva02_large_clsavg_3data_input448_bs32_lr1e-4_1e-6_wd5e-2_madgrad_wawrmup1_10epoch": (
        "eva02_large_clsavg",
        1,
        (0, 2),
    ),
    "eva02_large_clsonly_3data_input448_bs32_lr1e-4_1e-6_wd5e-2_madgrad_wawrmup1_10epoch": (
        "eva02_large_clsonly",
        1,
        (5, 9),
    ),
    "convnext_large_8data_noaug_input384_bs16_lr1e-5_1e-7_wd5e-2_sam_madgrad_wawrmup0_5epoch": (
        "convnext_large",
        2,
        (0, 1, 2, 3),
    ),
    "vit_large_8data_noaug_input336_bs16_lr1e-5_1e-7_wd5e-2_sam_madgrad_wawrmup0_5epoch": (
        "vit_large",
        2,
        (0, 3, 4, 8),
    ),
    "convnext_xxlarge_8data_noaug_input384_bs16_lr1e-6_1e-7_wd5e-2_sam_madgrad_wawrmup0_3epoch": (
        "convnext_xxlarge",
        2,
        (0, 1, 6, 7),
    ),
    "eva02_large_clsavg_8data_noaug_input448_bs16_lr1e-6_1e-7_wd5e-2_sam_madgrad_wawrmup0_3epoch": (
        "eva02_large_clsavg",
        2,
        (0, 2),
    ),
    "eva02_large_clsonly_8data_noaug_input448_bs16_lr1e-6_1e-7_wd5e-2_sam_madgrad_wawrmup0_3epoch": (
        "eva02_large_clsonly",
        2,
        (5, 9),
    ),
    "convnext_xxlarge_8data_noaug_input384_bs16_lr1e-6_1e-7_wd5e-2_sam_madgrad_wawrmup0_1epoch_fold6": (
        "convnext_xxlarge",
        3,
        (6,),
    ),
    "eva02_large_clsavg_8data_noaug_input448_bs16_lr1e-6_1e-7_wd5e-2_sam_madgrad_wawrmup0_1epoch_fold2": (
        "eva02_large_clsavg",
        3,
        (2,),
    ),
}


@pytest.mark.parametrize("stem", PUBLISHED)
def test_published_recipe(stem):
    model, stage, folds = PUBLISHED[stem]
    recipe = load_recipe(f"conf/{stem}.yaml")
    assert (recipe.model, recipe.stage, recipe.train_folds) == (model, stage, folds)
    assert find_recipe(model, stage).name == f"{stem}.yaml"
    # what the file name says
    assert f"input{recipe.input_size}" in stem
    assert f"_{recipe.epochs}epoch" in stem and f"wawrmup{recipe.warmup_epochs}_" in stem
    assert f"bs{recipe.max_local_batch_size}_" in stem and recipe.global_batch_size == 8 * recipe.max_local_batch_size
    assert recipe.prefix == stem.replace("_fold6", "").replace("_fold2", "")
    assert float(stem.split("_lr")[1].split("_")[0]) == recipe.lr and recipe.weight_decay == 5e-2
    assert (recipe.sam_rho == 0.05) == ("sam" in stem) and recipe.augment == (
        "none" if "noaug" in stem else "published"
    )
    assert len(recipe.datasets) == (6 if "8data" in stem else 3)
    assert recipe.freeze_epochs == recipe.warmup_epochs


@pytest.mark.parametrize("stem", [stem for stem, (_, stage, _) in PUBLISHED.items() if stage > 1])
def test_a_later_stage_starts_from_what_the_stage_before_writes(stem):
    recipe = load_recipe(f"conf/{stem}.yaml")
    before = load_recipe(find_recipe(recipe.model, recipe.stage - 1))
    fold = recipe.train_folds[0]
    assert recipe.initial_checkpoint(fold) == before.checkpoint_path(fold)
    assert fold in before.train_folds


def test_every_recipe_file_has_its_command_in_its_head():
    for path in recipe_files().values():
        head = path.read_text().split("\nprefix:")[0]
        assert all(line.startswith("#") or not line for line in head.splitlines())
        assert f"conf/{path.name}" in head or "papermill" in head, path


def write(tmp_path, tiny_recipe, *lines, drop=()):
    body = [line for line in tiny_recipe().to_yaml().splitlines() if line.split(":")[0] not in drop]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join([*body, *lines]) + "\n")
    return path


def test_numbers_that_yaml_reads_as_text(tmp_path, tiny_recipe):
    path = write(tmp_path, tiny_recipe, "lr: 1e-5", drop=["lr"])
    assert load_recipe(path).lr == 1e-5
    assert load_recipe(path, ["min_lr=2e-6", "epochs=7"]).min_lr == 2e-6


@pytest.mark.parametrize(
    ("line", "drop", "said"),
    [
        ("weigth_decay: 0.1", [], "no key 'weigth_decay'; did you mean 'weight_decay'?"),
        ("epochs: many", ["epochs"], "epochs is 'many'; it takes int"),
        ("epochs: 1.5", ["epochs"], "epochs is 1.5; it takes int"),
        ("epochs: true", ["epochs"], "epochs is True; it takes int"),
        ("augment: 1", ["augment"], "augment is 1; it takes bool"),
        ("mean: [0.5, 0.5]", ["mean"], "mean is"),
        ("stage: 4", ["stage"], "stage is 4; it can be 1, 2, 3"),
        ("epochs: 3", [], "given twice: epochs"),
        ("lr: .nan", ["lr"], "lr is nan"),
        ("", ["lr"], "lacks lr"),
        ("prefix: ../other", ["prefix"], "cannot leave it"),
        ("datasets: [a, a]", ["datasets"], "names one twice"),
        ("warmup_epochs: 2", ["warmup_epochs"], "leaves nothing of epochs=2"),
        ("stage: 2", ["stage"], "set initialize_from"),
        ("train_folds: [0, 10]", ["train_folds"], "folds are 0 to 9"),
    ],
)
def test_a_bad_recipe_is_refused_with_file_and_key(tmp_path, tiny_recipe, line, drop, said):
    path = write(tmp_path, tiny_recipe, line, drop=drop)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("epoch=1", "no key 'epoch'; did you mean 'epochs'?"),
        ("epochs", "write key=value"),
        ("epochs=x", "epochs is 'x'; it takes int"),
        ("augment=yes", "augment is 'yes'; it can be published, weak, none"),
    ],
)
def test_a_bad_override_is_refused(tmp_path, tiny_recipe, override, said):
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, tiny_recipe), [override])
    assert said in str(caught.value)


def test_overrides_take_lists_none_and_paths(tmp_path, tiny_recipe):
    path = write(tmp_path, tiny_recipe)
    changes = [
        "datasets=a,b",
        "train_folds=1,2",
        "pretrained=/w/file.safetensors",
        "initialize_from=none",
        "mean=0,0,1",
    ]
    recipe = load_recipe(path, changes)
    assert recipe.datasets == ("a", "b") and recipe.train_folds == (1, 2) and recipe.mean == (0.0, 0.0, 1.0)
    assert recipe.pretrained == "/w/file.safetensors" and recipe.initialize_from is None
    assert load_recipe(path, ["pretrained=true"]).pretrained is True
    assert load_recipe(path, ["train_folds=3"]).train_folds == (3,)


def test_a_recipe_survives_being_saved(tmp_path, tiny_recipe):
    recipe = tiny_recipe(initialize_from="a/b_fold{fold}.pth", pretrained="x.pth", sam_rho=0.05)
    (tmp_path / "saved.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_unknown_models_and_files_name_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'convnext_large'"):
        find_recipe("convnxt_large", 1)
    with pytest.raises(ConfigError, match=r"recipes for stages 1, 2, none for stage 3"):
        find_recipe("vit_large", 3)
    with pytest.raises(ConfigError, match=r"did you mean 'tiny_vit_stage1\.yaml'"):
        recipes.find_config("conf/tiny_vit_stag1.yaml")


def test_names_of_a_notebooks_parameter():
    """Papermill reads `-p seeds 0` as a number."""
    assert recipes.split_names(" a, ,b") == ["a", "b"] and recipes.split_names(0) == ["0"]
    assert recipes.split_names("") == []


def test_a_config_path_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipes.find_config("conf/tiny_vit_stage1.yaml") == paths.conf_dir() / "tiny_vit_stage1.yaml"


def test_help_lists_every_key():
    text = recipes.describe_keys()
    assert all(f"  {key}: " in text for key in Recipe.__dataclass_fields__)


def test_a_setting_of_sam_without_sam_is_refused(tiny_recipe):
    assert tiny_recipe(sam_rho=0.05, sam_gradient="averaged").sam_gradient == "averaged"
    with pytest.raises(ConfigError, match="sam_gradient=averaged is for SAM, and sam_rho=0 is none"):
        tiny_recipe(sam_gradient="averaged")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_decay": 0.0}, "layer_decay is 0.0; it must be above 0 and at most 1"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5; it must be above 0 and at most 1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; it must be 0 or more, and below 1"),
        ({"clip_grad": -1.0}, "clip_grad is -1.0; it must be a finite number of at least 0"),
        ({"loss": "l2"}, "loss is 'l2'; it can be cosine, angular"),
        ({"head_init": "ridge", "head_width": 64}, "head_init=ridge fits one Linear, and head_width=64 has two"),
        ({"head_width": 64, "max_local_batch_size": 1}, "head_width=64 has a BatchNorm, .* max_local_batch_size is 1"),
        ({"head_keys": 8, "head_width": 8}, "head_keys=8 and head_width=8 are two kinds of head; leave one out"),
        ({"head_keys": 8}, "head_keys=8: the keys are set by head_init=ridge or come with a checkpoint"),
        ({"freeze_blocks": 2, "freeze_epochs": 2}, "freeze_blocks=2 has no effect: freeze_epochs=2 of epochs=2"),
        ({"layer_decay": 0.7, "freeze_epochs": 3}, "layer_decay=0.7 has no effect: freeze_epochs=3 of epochs=2"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; it can be madgrad, adamw"),
        ({"head_init": "ridge", "initialize_from": "a.pth"}, "head_init=ridge would replace .* initialize_from"),
    ],
)
def test_settings_of_fine_tuning_that_make_no_sense_are_refused(tiny_recipe, changes, said):
    with pytest.raises(ConfigError, match=said):
        tiny_recipe(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"initialize_from": "../other/a.pth"},
        {"initialize_from": "a/../../b.pth"},
        {"initialize_from": "a\\b.pth"},
        {"initialize_from": ""},
        {"initialize_from": "a\0.pth"},
        {"prefix": "a\0b"},
        {"prefix": "a\x1b[31m"},
        {"prefix": "a\nb"},
        {"model_dir": "/a\0"},
        {"run_dir": "\u202eb"},
        {"pretrained": "/a\0b"},
        {"datasets": ("a\0b",)},
    ],
    ids=repr,
)
def test_no_name_leaves_its_folder_or_holds_what_cannot_be_seen(tiny_recipe, changes):
    (key,) = changes
    with pytest.raises(recipes.ConfigError, match=rf"^{key} is "):
        tiny_recipe(**changes)


def test_a_start_outside_of_the_models_is_an_absolute_path(tiny_recipe, tmp_path):
    recipe = tiny_recipe(initialize_from=f"{tmp_path}/a_fold{{fold}}.pth", model_dir="/models")
    assert recipe.initial_checkpoint(3) == tmp_path / "a_fold3.pth"
    recipe = tiny_recipe(initialize_from="x/a_fold{fold}.pth", model_dir="/models")
    assert str(recipe.initial_checkpoint(3)) == "/models/x/a_fold3.pth"


def test_the_published_sam_recipes_train_as_published():
    """The published code perturbs by the gradient that DDP has averaged over all ranks."""
    own = [load_recipe(path) for path in paths.repository_root().glob("conf/*_8data_*.yaml")]
    assert len(own) == 7 and {(recipe.sam_rho, recipe.sam_gradient) for recipe in own} == {(0.05, "averaged")}


@pytest.mark.parametrize(("before", "now"), [(True, "published"), (False, "none"), ("weak", "weak")])
def test_augment_is_read_as_earlier_files_spell_it(tmp_path, tiny_recipe, before, now):
    path = write(tmp_path, tiny_recipe, f"augment: {str(before).lower()}", drop=["augment"])
    assert load_recipe(path).augment == now == load_recipe(path, [f"augment={str(before).lower()}"]).augment
    assert load_recipe(path, [f"augment={now}"]) == tiny_recipe(augment=before)
