"""Options and keys of the published code are answered with ours."""

import pytest

from kutils.ensemble import predict
from kutils.runs import all_folds, launch, published_names, recipes
from kutils.training import evaluate, train

# of the published dist_train.py and its recipes
OPTIONS = "-m --ckpt_path --amp_dtype --num_workers --valid_bs --test --save_feats --debug --val_fold --skip_val"
OPTIONS += " --extract_feat --dataset_name --seed --backend --train_bs"
KEYS = "ckpt_path train_fold dataset_name drop_duplicates rgb_mean rgb_std backbone_freeze_epochs model_name"
KEYS += " set_grad_checkpointing backbone_name backbone_pretrained train_trans_mode valid_trans_mode input_width"
KEYS += " input_height train_bs valid_bs sam warmup_lr_init eva_drop_path_rate cls_mode"


@pytest.mark.parametrize("option", OPTIONS.split())
@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (train.main, ["--config", "conf/tiny_vit_stage1.yaml", "--fold", "0"]),
        (evaluate.main, ["--config", "conf/tiny_vit_stage1.yaml", "--fold", "0"]),
        (predict.main, []),
        (all_folds.main, ["8", "conf/tiny_vit_stage1.yaml"]),
    ],
)
def test_an_option_of_the_published_code_names_ours(option, main, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, option, "1"])
    assert ended.value.code == 2
    name, error = option.lstrip("-"), capsys.readouterr().err
    assert f"the published code's {name} " in error or f"write {name}=VALUE" in error


def test_what_a_hint_names_exists(capsys):
    assert published_names.hint("--val-fold=3") == published_names.hint("val_fold") != ""
    assert published_names.hint("epochs") == published_names.hint("--fold") == ""
    for name, text in published_names.NAMES.items():
        assert name not in published_names.KEYS, name
        for word in text.replace("(", " ").replace(",", " ").split():
            key, equals, _ = word.partition("=")
            assert not equals or key in published_names.KEYS, word
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    options = capsys.readouterr().out
    assert all(option in options for option in ("--checkpoint", "--predictions", "--features"))


@pytest.mark.parametrize("key", KEYS.split())
def test_a_key_of_a_published_recipe_names_ours(key, tmp_path):
    (tmp_path / "published.yaml").write_text(f"prefix: a\n{key}: 1\n")
    message = f"a recipe has no key '{key}'; the published code's {key} "
    with pytest.raises(recipes.ConfigError, match=f"published.yaml: {message}"):
        recipes.load_recipe(tmp_path / "published.yaml")
    with pytest.raises(recipes.ConfigError, match=message):
        recipes.load_recipe("conf/tiny_vit_stage1.yaml", [f"{key}=1"])
    with pytest.raises(ValueError, match=f"no parameter '{key}'; the published code's {key} "):
        launch.check_parameters(["fold = 0", f"# Parameters\n{key} = 1"])
