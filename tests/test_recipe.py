"""Recipe text and TOML: what they mean, and that every fault is shown at its place."""

import contextlib
import string
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lineage.errors import LineageError
from lineage.recipe import RecipeError, coefficients, parse
from lineage.recipe_toml import parse_toml

AVERAGE = """# Recipe for average merge
tmp1 = nai-full-pruned + bp_nman_e29, 0.5, fp16, ckpt
tmp2 = __O1__ + nep, 0.333, fp16, ckpt
tmp3 = __O2__ + Pastel-Mix, 0.25, fp16, ckpt
tmp4 = __O3__ + fantasyBackground_v10PrunedFp16, 0.2, fp16, ckpt
tmp5 = __O4__ + MyneFactoryBase_V1.0, 0.166, fp16, ckpt
AleaMix = __O5__ + anylora_FTMSE, 0.142, fp16, ckpt
"""
DIFFERENCE = """# Recipe for add difference merge
tmp1 = nai-full-pruned + bp_nman_e29, 0.5, fp16, ckpt
tmp2-ad = __O1__ + nep + nai-full-pruned, 0.5, fp16, safetensors
tmp3-ad = __O2__ + Pastel-Mix + nai-full-pruned, 0.5, fp16, safetensors
tmp4-ad = __O3__ + fantasyBackground_v10PrunedFp16 + nai-full-pruned, 0.5, fp16, safetensors
tmp5-ad = __O4__ + MyneFactoryBase_V1.0 + nai-full-pruned, 0.5, fp16, safetensors
AleaMix-ad = __O5__ + anylora_FTMSE + nai-full-pruned, 0.5, fp16, safetensors
"""
MODELS = [
    "nai-full-pruned",
    "bp_nman_e29",
    "nep",
    "Pastel-Mix",
    "fantasyBackground_v10PrunedFp16",
    "MyneFactoryBase_V1.0",
    "anylora_FTMSE",
]


def test_coefficients_of_a_chain_of_averages():
    found = coefficients(parse(AVERAGE))[-1]
    rounded = {name: round(float(c), 5) for name, c in found.items()}
    assert rounded == dict(zip(MODELS, [0.14319, 0.14319, 0.14297, 0.14311, 0.14311, 0.14243, 0.142], strict=True))
    assert sum(found.values()) == 1


def test_coefficients_of_a_chain_of_differences():
    found = coefficients(parse(DIFFERENCE))[-1]
    assert found == dict(zip(MODELS, [Fraction(-2), *[Fraction(1, 2)] * 6], strict=True))


def test_containers_flags_and_results():
    recipe = parse(DIFFERENCE)
    assert [s.container for s in recipe.steps] == ["ckpt"] + ["safetensors"] * 5
    assert all(s.half for s in recipe.steps)
    assert [recipe.steps[i].name for i in recipe.results] == ["AleaMix-ad"]
    assert parse("a = b + c, .5").steps[0].container == "ckpt"
    assert not parse("a = b + c, .5, ckpt").steps[0].half
    assert parse("a = b + c, .5, safetensors, fp16").steps[0].half


def test_comments_variables_and_blank_lines_do_not_count():
    recipe = parse("# x\n\n__SD15__, put your sd1.5\nx = a + __SD15__, 1 # + c\ny = __O1__ + b, 0\n")
    assert recipe.variables == ("__SD15__",)
    assert recipe.steps[0].operands[1].is_variable
    assert recipe.steps[1].operands[0].step == 0
    assert recipe.steps[0].method == "weighted_sum"


def test_plus_belongs_to_a_name_where_spaced_plus_separates():
    assert [o.text for o in parse("x = a+b + c, .5").steps[0].operands] == ["a+b", "c"]
    assert [o.text for o in parse("x = a+b+c, .5").steps[0].operands] == ["a", "b", "c"]


FAULTS = {
    "x = a + b": (1, 10, "weight is missing"),
    "x = a + b,": (1, 11, "weight is missing"),
    "x = a + b, half": (1, 12, "not a number"),
    "x = a + b, nan": (1, 12, "not a number"),
    "x = a + b, .5, fp61": (1, 16, "Did you mean fp16?"),
    "x = a + b, .5, ckpt, safetensors": (1, 22, "both ckpt and safetensors"),
    "x = a + b + c + d, .5": (1, 17, "fourth operand"),
    "x = a, .5": (1, 5, "only one operand"),
    "x = a + , .5": (1, 8, "name is missing"),
    "x = __O1__ + b, .5": (1, 5, "names its own line"),
    "x = a + b, .5\ny = a + __O3__, .5": (2, 9, "does not come before"),
    "x = a + __O0__, .5": (1, 9, "does not come before"),
    "just words": (1, 1, "no '='"),
    "__X, note": (1, 1, "must declare a variable"),
    "x = a + b, .5\n X = a + b, .5": (2, 2, "line 1 already makes"),
    "../x = a + b, .5": (1, 1, "does not stay inside"),
    "= a + b, .5": (1, 1, "does not stay inside"),
    "y/../../x = a + b, .5": (1, 1, "does not stay inside"),
    "/etc/x = a + b, .5": (1, 1, "does not stay inside"),
    ".. /x = a + b, .5": (1, 1, "does not stay inside"),
    "NUL = a + b, .5": (1, 1, "cannot be a file name"),
    "a/com1.x = a + b, .5": (1, 1, "cannot be a file name"),
    "x\x01y = a + b, .5": (1, 1, "cannot be a file name"),
}


@pytest.mark.parametrize("text", FAULTS)
def test_fault_is_shown_at_its_place(text):
    line, column, words = FAULTS[text]
    with pytest.raises(RecipeError, match=words) as caught:
        parse(text, "r.txt")
    assert (caught.value.line, caught.value.column) == (line, column)
    shown = str(caught.value).splitlines()
    assert shown[0].startswith(f"r.txt:{line}:{column}: ")
    assert shown[2].index("^") == 4 + column - 1


@pytest.mark.parametrize("name", ["a|b", "a:b", "..\\x", "C:\\x", "a?b*c", '"a"<b>'])
def test_output_name_is_one_on_windows_too(name):
    import ntpath

    step = parse(f"{name} = a + b, .5").steps[0]
    assert not set(step.name) & set('\\|:?"<>*')
    inside = ntpath.normpath(ntpath.join("C:\\out", step.name + ".ckpt"))
    assert ntpath.dirname(inside) == "C:\\out"


def test_weight_outside_the_unit_interval_warns():
    assert "outside" in parse("x = a + b, 1.5").warnings[0]
    assert "outside" in parse("x = a + b, -0.1").warnings[0]
    assert not parse("x = a + b, 1").warnings


@given(st.text(alphabet=string.printable, max_size=80))
def test_any_text_parses_or_is_refused_with_a_message(text):
    with contextlib.suppress(LineageError):
        assert parse(text).steps


@given(st.lists(st.tuples(st.booleans(), st.decimals(-2, 2, places=4)), min_size=1, max_size=12))
def test_coefficients_sum_to_one_exactly(lines):
    text = "x0 = m0 + m1, 0.25\n" + "".join(
        f"x{i} = __O{i}__ + m{i + 1}{' + m0' if difference else ''}, {m}\n"
        for i, (difference, m) in enumerate(lines, 1)
    )
    assert all(sum(c.values()) == 1 for c in coefficients(parse(text)))


TOML = """
[[merge]]
name = "mix"
models = ["a", "b"]
weight = 0.5
blocks = { "IN0*" = 0.25 }
take = { vae = "c" }
adapters = { "l.safetensors" = 0.65 }
"""


def test_toml_says_what_text_cannot():
    recipe = parse_toml(TOML)
    step = recipe.steps[0]
    assert recipe.arithmetic == "float32"
    assert step.blocks == (("IN0*", 0.25),)
    assert step.take[0][0] == "vae"
    assert step.adapters[0][1] == 0.65


@pytest.mark.parametrize(("count", "levels"), [(26, 12), (20, 9)])
def test_block_lists_are_named(count, levels):
    text = f'[[merge]]\nname = "x"\nmodels = ["a", "b"]\nweight = 0\nblocks = {[i / count for i in range(count)]}'
    blocks = dict(parse_toml(text).steps[0].blocks)
    assert blocks["*"] == 0
    assert blocks["M00"] == (1 + levels) / count
    assert blocks["TIME"] == blocks["IN00"]
    assert blocks["OUT"] == blocks[f"OUT{levels - 1:02d}"] == (count - 1) / count


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("weight", "wieght"), "Did you mean weight"),
        (("vae", "vaa"), "Did you mean vae"),
        (('["a", "b"]', '["a"]'), "takes 2 models, 1 given"),
        (("weight = 0.5", ""), "weight is missing"),
        (("weight = 0.5", "weight = true"), "not a number"),
        (('"mix"', '"../mix"'), "does not stay inside"),
        (('{ "IN0*" = 0.25 }', "[1, 2]"), "26 numbers"),
        (('"b"', '"__O1__"'), "names its own line"),
        (("[[merge]]", "[[merges]]"), "unknown key 'merges'"),
        (("= 0.5", "= = 0.5"), "line 5"),
    ],
)
def test_toml_faults_are_named(change, words):
    with pytest.raises(LineageError, match=words):
        parse_toml(TOML.replace(*change))
