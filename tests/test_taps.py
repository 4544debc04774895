import pytest
from hypothesis import given
from hypothesis import strategies as st

from repkit.taps import Tap, Time, parse_blocks, parse_taps, parse_time

NAMES = ["down.0.resnet.0", "down.0", "down.1", "mid.attn.0", "mid", "up.0.resnet.0", "up.0", "up.1"]

numbers = st.floats(allow_nan=False, allow_infinity=False)
times = (
    st.integers(0, 999_999).map(lambda t: Time("t", t))
    | numbers.map(lambda value: Time("sigma", value))
    | numbers.map(lambda value: Time("logsnr", value))
    | numbers.map(lambda value: Time("clean", value))
    | st.just(Time("clean"))
)


@pytest.mark.parametrize(
    ("text", "time", "canonical"),
    [
        ("261", Time("t", 261), "261"),
        (" 0261 ", Time("t", 261), "261"),
        ("0", Time("t", 0), "0"),
        ("sigma=0.26", Time("sigma", 0.26), "sigma=0.26"),
        ("sigma=.5", Time("sigma", 0.5), "sigma=0.5"),
        ("sigma=2", Time("sigma", 2.0), "sigma=2"),
        ("sigma=1e-05", Time("sigma", 1e-5), "sigma=1e-05"),
        ("logsnr=-1.5", Time("logsnr", -1.5), "logsnr=-1.5"),
        ("logsnr=+3.0", Time("logsnr", 3.0), "logsnr=3"),
        ("clean", Time("clean"), "clean"),
        ("clean:1", Time("clean", 1.0), "clean:1"),
    ],
)
def test_times(text, time, canonical):
    assert parse_time(text) == time
    assert str(time) == canonical


@pytest.mark.parametrize(
    "text", ["", "-1", "2.5", "sigma", "sigma=", "sigma=nan", "sigma=inf", "snr=1", "clean:", "t=3"]
)
def test_what_is_no_time_is_refused_with_the_grammar(text):
    with pytest.raises(ValueError, match="no time .* write a training timestep .* sigma=0.26, logsnr=-1.5, clean"):
        parse_time(text)


@given(times)
def test_canonical_times_read_back(time):
    assert parse_time(str(time)) == time


@given(st.sampled_from(NAMES), times)
def test_canonical_keys_read_back(block, time):
    tap = Tap(block, time)
    assert parse_taps(str(tap), NAMES) == [tap]


def test_a_tap_without_time_is_its_block():
    assert str(Tap("block.11.k")) == "block.11.k"


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("mid", ["mid"]),
        ("up.*", ["up.0", "up.1"]),
        ("*", ["mid"]),
        ("*.0", ["down.0", "up.0"]),
        ("*.0.resnet.*", ["down.0.resnet.0", "up.0.resnet.0"]),
        ("up.1, mid ,up.*", ["up.1", "mid", "up.0"]),
        ("mid,/mid_block.resnets.0,mid", ["mid", "/mid_block.resnets.0"]),
    ],
)
def test_blocks(blocks, expected):
    assert parse_blocks(blocks, NAMES) == expected


@pytest.mark.parametrize("block", ["up", "up.9", "up.*.*", "m.d", "", "down.0.", "(mid", "clean"])
def test_unknown_blocks_are_refused_with_what_there_is(block):
    with pytest.raises(ValueError) as refused:
        parse_blocks(block, NAMES, model="sd21")
    text = str(refused.value)
    assert repr(block) in text and "in sd21; have down.0, down.1, mid, up.0, up.1" in text
    assert "\n" not in text


def test_a_typing_error_gets_suggestions():
    with pytest.raises(ValueError, match=r"close to it: down\.0\.resnet\.0"):
        parse_blocks("down.0.resnt.0", NAMES)


def test_groups_multiply_blocks_and_times_in_order_without_repeats():
    taps = parse_taps(["up.*@10,sigma=0.5", "mid@10", "up.0@10"], NAMES)
    assert [str(tap) for tap in taps] == ["up.0@10", "up.1@10", "up.0@sigma=0.5", "up.1@sigma=0.5", "mid@10"]
    assert parse_taps("mid@ 1, 2", NAMES) == [Tap("mid", Time("t", 1)), Tap("mid", Time("t", 2))]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("mid", "'mid' has no time; .* for example mid@100"),
        ("mid@", "has no time"),
        ("@100", "no block ''"),
        ("mid@1,", "no time ''"),
        ("mid@1,up.0@1", "no time 'up.0@1'; .* before the one @: up.1,up.2@50"),
        ("mid@1@2", "no time '1@2'"),
        ([], "no taps given"),
    ],
)
def test_broken_groups(groups, message):
    with pytest.raises(ValueError, match=message):
        parse_taps(groups, NAMES)
