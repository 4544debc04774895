"""Prompts: what is kept of them, where, and for how long."""

import pytest
import torch

from repkit.backbones.prompts import Prompts, TextEncoders

ROW = 4 * 5  # bytes of one text


class Encoding:
    """Texts to five numbers each, the texts noted; encoders that are opened again after they were freed are counted."""

    def __init__(self, cache=None, rows=3, null=""):
        self.texts, self.opened = [], 0
        encoders = TextEncoders(self.open, cache=cache, fingerprint="same")
        self.prompts = Prompts(
            encoders, self.encode, shapes={"told": (5,)}, model="toy", null=null, memory=rows * ROW + 1
        )

    def open(self):
        self.opened += 1
        return {"text_encoder": torch.nn.Linear(2, 2)}

    def encode(self, encoders, text):
        assert encoders
        self.texts.append(text)
        return {"told": torch.full((5,), float(len(text)))}

    def ask(self, *texts):
        told = self.prompts.condition(list(texts), len(texts), torch.device("cpu"), torch.float32).tensors["told"]
        assert told.tolist() == [[float(len(text))] * 5 for text in texts]


def test_the_text_that_was_not_used_for_longest_is_forgotten_first():
    toy = Encoding()
    toy.ask("a", "bb", "ccc", "a", "dddd")  # forgets bb
    assert toy.texts == ["a", "bb", "ccc", "dddd"]
    toy.ask("a", "ccc", "dddd", "bb")
    assert toy.texts == ["a", "bb", "ccc", "dddd", "bb"]


def test_what_is_forgotten_is_read_from_disk(tmp_path):
    toy = Encoding(cache=tmp_path)
    told = []
    toy.prompts.learn(["a", ["bb", "ccc"], "dddd", "a", "eeeee"], lambda done, total: told.append((done, total)))
    assert toy.texts == ["a", "bb", "ccc", "dddd", "eeeee"] and told == [(n, 5) for n in range(1, 6)]
    toy.ask("a", "bb", "ccc", "dddd", "eeeee")
    assert (len(toy.texts), toy.opened) == (5, 1)


def test_what_memory_cannot_hold_is_encoded_as_it_comes(caplog):
    toy = Encoding()
    told = []
    assert toy.prompts.learn([c * n for n, c in enumerate("abcde", 1)], lambda *numbers: told.append(numbers)) == 0
    assert toy.texts == ["a", "bb", "ccc"] and told == [(1, 5), (2, 5), (3, 3)]
    assert "3 of 5 prompts of toy are encoded ahead" in caplog.text and "--prompt-cache" in caplog.text
    toy.ask("a", "bb", "ccc", "dddd", "eeeee")
    assert (len(toy.texts), toy.opened) == (5, 1)


def test_what_memory_holds_is_encoded_ahead_and_the_encoders_go(caplog):
    toy, told = Encoding(), []
    assert toy.prompts.learn(["a", "bb", "a", "ccc"], lambda *numbers: told.append(numbers)) == 4 * 6
    assert toy.prompts.learn(["bb", "a"], lambda *numbers: told.append(numbers)) == 0  # known, so nothing is opened
    toy.ask("a", "bb", "ccc")
    assert (toy.opened, told) == (1, [(1, 3), (2, 3), (3, 3)]) and caplog.text == ""


def test_a_single_text_is_not_worth_a_report():
    told = []
    Encoding().prompts.learn(["a"], lambda *numbers: told.append(numbers))
    assert told == []


@pytest.mark.parametrize(("null", "texts"), [("", [""]), (None, [])])
def test_the_null_prompt_is_the_empty_text_or_zeros(null, texts):
    toy = Encoding(null=null)
    told = toy.prompts.condition(None, 2, torch.device("cpu"), torch.float32).tensors["told"]
    assert toy.texts == texts and told.tolist() == [[0.0] * 5] * 2
