"""Which parameter gets which format, rule by rule."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.errors import ModuleError
from tierstore.formats.choosing import FEWEST_ELEMENTS, Parameter, choose_formats, words_of
from tierstore.formats.format import part_specs
from tierstore.formats.named import FORMAT_NAMES, FORMATS, format_named
from tierstore.tensors import ITEMSIZE, KEEP

COARSE = ("int4", "int4-g32", "int4-g128", "fp8", "fp4", "mxfp4")
Kind = Literal["table", "tied", "weight"]
KINDS: tuple[Kind, ...] = ("table", "tied", "weight")


def weight(
    *names: str, shape: tuple[int, ...] = (256, 256), dtype: str = "bfloat16", kind: Kind = "weight"
) -> Parameter:
    return Parameter(names, shape, dtype, kind)


MODEL = [
    weight("embed.weight", "lm_head.weight", shape=(1000, 128), kind="tied"),
    weight("layers.0.attn.q.weight"),
    weight("layers.0.attn.q.bias", shape=(256,)),
    weight("layers.0.experts.gate_up", shape=(4, 128, 256)),
    weight("layers.0.norm.weight", shape=(256,)),
    weight("steps", shape=(128, 128), dtype="int64"),
]


def chosen(parameter: Parameter, default: str | None, **patterns: str) -> str:
    return choose_formats([parameter], default, patterns)[parameter.names[0]]


# Without patterns


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_weights_take_the_default(name: str) -> None:
    assert chosen(weight("a.weight", dtype="float32"), name) == name


@pytest.mark.parametrize("default", [None, KEEP])
def test_no_default_packs_nothing(default: str | None) -> None:
    assert set(choose_formats(MODEL, default, {}).values()) == {KEEP}


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("dtype", sorted(set(ITEMSIZE) - {"float64", "float32", "float16", "bfloat16"}))
def test_only_plain_floats_are_packed(name: str, dtype: str) -> None:
    assert chosen(weight("a.weight", dtype=dtype), name) == KEEP


@pytest.mark.parametrize("shape", [(), (8192,), (0, 8192), (8192, 0)])
def test_vectors_and_empty_tensors_are_kept(shape: tuple[int, ...]) -> None:
    assert chosen(weight("a.weight", shape=shape), "int8") == KEEP


def test_small_tensors_are_kept() -> None:
    assert chosen(weight("a.weight", shape=(64, 63)), "int4") == KEEP
    assert chosen(weight("a.weight", shape=(64, FEWEST_ELEMENTS // 64)), "int4") == "int4"


@pytest.mark.parametrize("shape", [(2, 4096), (4096, 1, 4)])
def test_what_padding_would_make_larger_is_kept(shape: tuple[int, ...]) -> None:
    assert chosen(weight("a.weight", shape=shape), "int4") == KEEP
    assert chosen(weight("a.weight", shape=shape), "int8") == KEEP


@pytest.mark.parametrize(("dtype", "want"), [("float64", "bf16"), ("float32", "bf16"), ("float16", KEEP)])
def test_bf16_is_for_what_is_wider(dtype: str, want: str) -> None:
    for kind in KINDS:
        assert chosen(weight("a.weight", dtype=dtype, kind=kind), "bf16") == want
        assert chosen(weight("a.weight", dtype="bfloat16", kind=kind), "bf16") == KEEP


@pytest.mark.parametrize("name", COARSE)
@pytest.mark.parametrize("kind", ["table", "tied"])
def test_tables_are_int8_under_coarse_formats(name: str, kind: Kind) -> None:
    assert chosen(weight("a.weight", kind=kind), name) == "int8"


@pytest.mark.parametrize("name", ["int8", "int8-row"])
def test_tied_tables_are_kept_under_8_bit_integers(name: str) -> None:
    assert chosen(weight("a.weight", kind="tied"), name) == KEEP
    assert chosen(weight("a.weight", kind="table"), name) == name


# Patterns


@pytest.mark.parametrize("pattern", ["lm_head", "lm_head.weight", "embed", "lm*", "*.weight", "[e]mbed", "?m_head"])
def test_patterns_match_names_and_paths_of_modules(pattern: str) -> None:
    assert choose_formats(MODEL, None, {pattern: "int4"})["embed.weight"] == "int4"


@pytest.mark.parametrize("pattern", ["LM_HEAD", "head", "lm_head.", "weight", ""])
def test_patterns_are_whole_and_have_case(pattern: str) -> None:
    with pytest.raises(ModuleError, match="matches no parameter"):
        choose_formats(MODEL, None, {pattern: "int4"})


def test_first_pattern_wins() -> None:
    patterns = {"*experts*": "int4", "layers.*": "fp8", "*": KEEP}
    assert choose_formats(MODEL, "int8", patterns) == {
        "embed.weight": KEEP,
        "layers.0.attn.q.weight": "fp8",
        "layers.0.attn.q.bias": KEEP,
        "layers.0.experts.gate_up": "int4",
        "layers.0.norm.weight": KEEP,
        "steps": KEEP,
    }


def test_patterns_are_above_every_rule_for_what_can_be_packed() -> None:
    small = weight("a.weight", shape=(2, 2))
    assert choose_formats([small], None, {"a": "int4"}) == {"a.weight": "int4"}
    tied = weight("b.weight", kind="tied")
    assert choose_formats([tied], "int8", {"b": "int8"}) == {"b.weight": "int8"}
    assert choose_formats([tied], "int4", {"b": "fp4"}) == {"b.weight": "fp4"}
    assert choose_formats([tied], "int4", {"b": KEEP}) == {"b.weight": KEEP}


@pytest.mark.parametrize(("dtype", "want"), [("float32", "bf16"), ("float16", KEEP), ("bfloat16", KEEP)])
def test_a_pattern_for_bf16_keeps_what_has_16_bits(dtype: str, want: str) -> None:
    assert choose_formats([weight("head.weight", dtype=dtype)], "int4", {"head": "bf16"}) == {"head.weight": want}


def test_wildcards_keep_what_cannot_be_packed() -> None:
    formats = choose_formats(MODEL, None, {"*": "int4"})
    assert {name for name, form in formats.items() if form == "int4"} == {
        "embed.weight",
        "layers.0.attn.q.weight",
        "layers.0.experts.gate_up",
    }
    assert choose_formats(MODEL, None, {"layers.0.attn.q": "int4"})["layers.0.attn.q.bias"] == KEEP


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("layers.0.norm.weight", "without two axes"),
        ("layers.0.norm", "without two axes"),
        ("*norm*", "without two axes"),
        ("layers.0.attn.q.bias", "without two axes"),
        ("steps", "is int64"),
    ],
)
def test_a_pattern_for_what_cannot_be_packed(pattern: str, why: str) -> None:
    with pytest.raises(ModuleError, match=f"cannot be packed as int8.*{why}.*'keep'"):
        choose_formats(MODEL, None, {pattern: "int8"})
    assert set(choose_formats(MODEL, None, {pattern: KEEP}).values()) == {KEEP}


def test_an_unmatched_pattern_names_what_is_near() -> None:
    with pytest.raises(ModuleError, match=r"'lm_heads' matches no parameter.*lm_head"):
        choose_formats(MODEL, None, {"lm_heads": "int8"})
    with pytest.raises(ModuleError, match="there are none at all"):
        choose_formats([], None, {"*": "int8"})


def test_a_pattern_that_others_leave_nothing_to() -> None:
    with pytest.raises(ModuleError, match=r"'lm_head' matches is decided by patterns before it: put it first"):
        choose_formats(MODEL, None, {"*": "int4", "lm_head": "int8"})
    assert choose_formats(MODEL, None, {"lm_head": "int8", "*": "int4"})["embed.weight"] == "int8"


# Names


@pytest.mark.parametrize("name", ["fp16", "fp32", "INT8", "int4 ", "", "q4_0"])
def test_unknown_formats(name: str) -> None:
    listed = "int8, int8-row, int4, int4-g32, int4-g128, fp8, fp4, mxfp4, bf16"
    said = f"{name!r}: choose one of {listed}; 'keep' leaves a tensor as it is"
    with pytest.raises(ModuleError, match=said):
        format_named(name)
    with pytest.raises(ModuleError, match=said):
        choose_formats(MODEL, None, {"*": name})
    if name:
        with pytest.raises(ModuleError, match=said):
            choose_formats([], name, {})


def test_formats_carry_their_names() -> None:
    assert FORMAT_NAMES == ("int8", "int8-row", "int4", "int4-g32", "int4-g128", "fp8", "fp4", "mxfp4", "bf16")
    assert [FORMATS[name].name for name in FORMAT_NAMES] == list(FORMAT_NAMES)
    assert [FORMATS[name].group for name in FORMAT_NAMES] == [64, 0, 64, 32, 128, 0, 16, 32, 0]
    assert all(format_named(name) is FORMATS[name] for name in FORMAT_NAMES)


# Laws

parameters = st.lists(
    st.builds(
        Parameter,
        names=st.lists(st.from_regex(r"[ab]\.[ab]\.(weight|bias)", fullmatch=True), min_size=1, max_size=2).map(tuple),
        shape=st.lists(st.sampled_from([0, 1, 3, 40, 64, 300]), max_size=3).map(tuple),
        dtype=st.sampled_from(sorted(ITEMSIZE)),
        kind=st.sampled_from(KINDS),
    ),
    unique_by=lambda parameter: parameter.names[0],
    max_size=8,
)


@given(parameters, st.sampled_from([None, KEEP, *FORMAT_NAMES]))
@settings(deadline=None)
def test_defaults_never_make_anything_larger(parameters: list[Parameter], default: str | None) -> None:
    formats = choose_formats(parameters, default, {})
    assert list(formats) == [parameter.names[0] for parameter in parameters]
    for parameter in parameters:
        name = formats[parameter.names[0]]
        if name != KEEP:
            nbytes = ITEMSIZE[parameter.dtype]
            for size in parameter.shape:
                nbytes *= size
            assert sum(part.nbytes for part in part_specs(FORMATS[name], parameter.shape)) < nbytes


@given(
    parameters,
    st.sampled_from([None, *FORMAT_NAMES]),
    st.dictionaries(
        st.sampled_from(["a.*", "*.weight", "b.b", "*bias", "*"]), st.sampled_from([KEEP, *FORMAT_NAMES]), max_size=3
    ),
)
@settings(deadline=None)
def test_patterns_decide_only_what_they_match(
    parameters: list[Parameter], default: str | None, patterns: dict[str, str]
) -> None:
    without = choose_formats(parameters, default, {})
    try:
        formats = choose_formats(parameters, default, patterns)
    except ModuleError:
        return
    for parameter in parameters:
        name = formats[parameter.names[0]]
        words = words_of(parameter)
        matching = [
            form
            for pattern, form in patterns.items()
            if pattern == "*"
            or (pattern[0] == "*" and any(word.endswith(pattern[1:]) for word in words))
            or (pattern[-1] == "*" and any(word.startswith(pattern[:-1]) for word in words))
            or pattern in words
        ]
        assert name in ((matching[0], KEEP) if matching else (without[parameter.names[0]],))
