"""Profiles: equal keys, overrides, and errors that name the bad value and what would be right."""

from __future__ import annotations

import ast
import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from invertune.arguments import mapping_of
from invertune.results import DEVELOPMENT_SEED
from invertune.sections import Settings
from invertune.settings import PARAMS, SettingsError, as_yaml, load_settings

PROFILES = ("smoke", "mini", "scenes224", "paper")


def raw(profile: str) -> dict[str, Any]:
    return yaml.safe_load((PARAMS / f"{profile}.yml").read_text())


def keys(values: Any, prefix: str = "") -> list[str]:
    """Nested keys in their order, "attacks.badnet.lr"."""
    if not isinstance(values, dict):
        return []
    return [line for k, v in values.items() for line in (prefix + k, *keys(v, f"{prefix}{k}."))]


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    nested = {f"{prefix}{k}": v for k, v in values.items() if not isinstance(v, dict)}
    for key, value in values.items():
        if isinstance(value, dict):
            nested |= leaves(value, f"{prefix}{key}.")
    return nested


def at(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def test_all_profiles_have_equal_keys_in_equal_order():
    assert sorted(p.stem for p in PARAMS.glob("*.yml")) == sorted(PROFILES)
    assert all(keys(raw(profile)) == keys(raw("smoke")) for profile in PROFILES)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_says_everything_and_survives_its_own_yaml(profile):
    settings = load_settings(profile)
    dumped = yaml.safe_load(as_yaml(settings))
    assert dumped.pop("profile") == profile
    assert keys(dumped) == keys(raw(profile))  # no default stands in the code
    assert Settings.model_validate({"profile": profile, **dumped}) == settings


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_hold_no_paths_and_short_lines(profile):
    lines = (PARAMS / f"{profile}.yml").read_text().splitlines()
    assert max(map(len, lines)) <= 100
    assert not [v for v in leaves(raw(profile)).values() if isinstance(v, str) and "/" in v]


def test_every_value_of_the_paper_profile_has_a_comment():
    for line in (PARAMS / "paper.yml").read_text().splitlines():
        value = line.partition("#")[0].strip()
        if value and not value.endswith(":"):
            assert " # " in line or line.startswith("device"), line


def test_a_plain_run_of_mini_regenerates_a_reported_seed():
    assert DEVELOPMENT_SEED not in [str(seed) for seed in load_settings("mini").seeds]


def test_smoke_and_mini_run_on_what_the_repository_ships():
    for profile in ("smoke", "mini"):
        settings = load_settings(profile)
        assert settings.data.source == "pictograms" and settings.data.image_size_px == 64


def test_scenes224_is_of_full_size_but_for_the_data():
    own, paper = load_settings("scenes224"), load_settings("paper")
    assert own.data.source == "pictograms" and own.weights == "pretrained"
    assert own.data.image_size_px == paper.data.image_size_px
    assert own.precision == paper.precision
    for attack in ("badnet", "badencoder", "badclip"):
        assert getattr(own.attacks, attack).patch_px == getattr(paper.attacks, attack).patch_px


def test_the_paper_profile_has_the_papers_values():
    paper = load_settings("paper")
    lambdas = [getattr(paper.inversion, f"lambda{i}") for i in (1, 2, 3, 4)]
    assert lambdas == [5.0, 0.5, 1.0, 0.01] and paper.inversion.lr == 1e-2  # 4.1
    assert (paper.tuning.beta, paper.tuning.lrs, paper.tuning.steps) == (0.5, (8e-6,), 200)
    badnet = paper.attacks.badnet  # A.1: 1,500 of 500,000, ten epochs
    assert paper.data.poisoning_pairs * badnet.poison_rate == pytest.approx(1500)
    assert badnet.steps == paper.data.poisoning_pairs // badnet.batch * 10
    assert (badnet.lr, badnet.batch, badnet.patch_px) == (1e-6, 128, 16)


def test_overrides_change_one_value_and_nothing_else():
    plain = leaves(load_settings("smoke").model_dump(mode="json"))
    changed = leaves(load_settings("smoke", at("attacks.badnet.lr", 0.5)).model_dump(mode="json"))
    assert changed.pop("attacks.badnet.lr") == 0.5
    plain.pop("attacks.badnet.lr")
    assert changed == plain


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{1: 2}", "unknown key '1'; the keys"),
        ("{attacks: {badnet: {2: 3}}}", "unknown key 'attacks.badnet.2'; the keys"),
        ("{%s: 1}" % ("k" * 900), f"unknown key '{'k' * 200}'; the keys"),
        ("{target: [%s]}" % ("x, " * 5000), "target = ['x', "),
        ("x" * 5000, "is not a mapping"),
        ("[" * 5000, "--overrides is not YAML"),
        ("{seeds: 2020-99-99}", "--overrides is not YAML: month"),
    ],
)
def test_overrides_that_are_none_are_told_in_few_words(text, words):
    with pytest.raises(SettingsError) as caught:
        load_settings("smoke", mapping_of(text))
    assert words in str(caught.value) and len(str(caught.value)) < 500


BAD = {
    "no.such": "unknown key 'no'; the keys here are: seeds, backbone",
    "attacks.badnet.rate": "unknown key 'attacks.badnet.rate'; the keys here are: poison_rate",
}


@pytest.mark.parametrize("path", BAD)
def test_an_unknown_key_is_named_with_the_keys_there_are(path):
    with pytest.raises(SettingsError) as caught:
        load_settings("smoke", at(path, 1))
    assert str(caught.value).startswith(BAD[path])


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("attacks.names", ["badnett"], "'badnet', 'blended'"),
        ("backbone", "RN5", "'RN50', 'RN101', 'ViT-B-16' or 'ViT-B-32'"),
        ("inversion.steps", 0, "greater than or equal to 1"),
        ("inversion.steps", 2.5, "integer"),
        ("attacks.badnet.poison_rate", 1.5, "less than or equal to 1"),
        ("attacks.badnet.lr", 0, "greater than 0"),
        ("attacks.badnet.lr", "fast", "number"),
        ("attacks.gate_asr_percent", 101, "less than or equal to 100"),
        ("inversion.lambda4", -0.1, "greater than or equal to 0"),
        ("inversion.clamp", "none", "'per_channel' or 'scalar'"),
        ("identification.kinds", ["ball"], "'patch_feature'"),
        ("seeds", [-1], "greater than or equal to 0"),
        ("seeds", [2**32], "less than 4294967296"),
        ("seeds", [], "at least 1 item"),
        ("precision", "float16", "'float32' or 'bfloat16'"),
        ("device", "tpu", "'auto', 'cpu' or 'cuda'"),
        ("inversion.lambda4", math.inf, "finite"),
        ("inversion.steps", True, "true and false"),
        ("seeds", [True, False], "true and false"),
        ("ablations.tuning.lrs", [[True]], "true and false"),
        ("seeds", [7, 7], "twice"),
        ("identification.patch_px", 65, "at most 64, which is data.image_size_px"),
        ("tuning.batch", 33, "at most 32, which is tuning.images"),
        ("identification.batch", 65, "which is generalization.few_images"),
        ("inversion.batch", 65, "which is generalization.few_images"),
        ("generalization.few_tuning_images", 65, "which is generalization.few_images"),
        ("ablations.tuning.images", [211], "at most 210, which is data.inversion_images"),
        ("attacks.badclip.batch", 1, "greater than or equal to 2"),
        ("baselines.par.batch", 10**6, "which is baselines.pairs"),
        ("baselines.par.erase_area", [0.5, 0.1], "smallest first"),
    ],
)
def test_a_bad_value_is_named_with_what_would_be_right(path, value, words):
    with pytest.raises(SettingsError) as caught:
        load_settings("smoke", at(path, value))
    message = str(caught.value)
    assert message.startswith(path) and words in message and "\n" not in message
    assert repr(value[0] if isinstance(value, list) and value else value) in message


def test_a_batch_of_step_3_fits_all_that_it_is_tuned_on():
    tuning = {"tuning": {"images": 64, "batch": 64}}
    with pytest.raises(SettingsError, match=r"most 32, which is .*few_tuning_images"):
        load_settings("smoke", tuning)
    few = {"generalization": {"few_tuning_images": 64}}
    load_settings("smoke", tuning | few)
    images = {"ablations": {"tuning": {"images": [128, 48]}}}
    with pytest.raises(SettingsError, match="most 48, which is ablations"):
        load_settings("smoke", tuning | few | images)
    load_settings("smoke", tuning | images | {"data": {"source": "images:folder"}})


@settings(deadline=None)
@given(st.sampled_from(sorted(leaves(raw("smoke")))), st.sampled_from([None, "x/y", {}, [[]]]))
def test_no_wrong_type_anywhere_is_more_than_one_clear_line(path, value):
    if path in ("target", "weights") and isinstance(value, str):
        return  # any text names one of these; the data and open_clip know which there are
    with pytest.raises(SettingsError) as caught:
        load_settings("smoke", at(path, value))
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_profile_is_named_with_the_profiles_there_are():
    with pytest.raises(SettingsError, match=r"unknown profile 'mimi'; choose one of mini, paper"):
        load_settings("mimi")
    for name in ("../params/mini", "Mini", "", "a" * 5000 + "/"):
        with pytest.raises(SettingsError, match=r"^profile '.{0,200}': its name may hold a-z"):
            load_settings(name)


def test_a_profile_is_named_by_its_file(tmp_path):
    content = (PARAMS / "smoke.yml").read_text()
    (tmp_path / "own.yml").write_text(f"profile: mini\n{content}")
    assert load_settings("own", params=tmp_path).profile == "own"


def test_settings_cannot_change_after_they_were_checked():
    with pytest.raises(ValueError, match="frozen"):
        load_settings("smoke").inversion.steps = 3  # type: ignore[misc]


def test_numbers_in_the_profiles_are_numbers_to_yaml():
    """YAML reads 1e-6 as text: every number must be spelled so that it is read as one."""
    for profile in PROFILES:
        for path, value in leaves(raw(profile)).items():
            if isinstance(value, str):
                with pytest.raises((ValueError, SyntaxError)):
                    assert not isinstance(ast.literal_eval(value), int | float), path
