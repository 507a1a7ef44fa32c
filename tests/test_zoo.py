"""The bundled models: texts whose answers and facts are recomputed here from the text alone, tokenizers, weights, training."""

import json
import re
import stat
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open
from transformers.utils import logging as hf_logging

import throughline.zoo.training as training
from throughline.errors import InputError
from throughline.models import open_model
from throughline.records import Document
from throughline.study import ModelSpec
from throughline.zoo import NAMES, resolve_path
from throughline.zoo.recipes import recipe_of
from throughline.zoo.texts import (
    HIGHEST,
    LOWEST,
    TEMPLATES,
    is_heldout,
    pose_problem,
    sample_problems,
    solve,
)
from throughline.zoo.vocabularies import build_tokenizer

pytestmark = pytest.mark.xdist_group("zoo")  # what it sets up takes long

PLACES = {"units": 0, "tens": 1, "hundreds": 2}
BUNDLED = [name for name in NAMES if Path(resolve_path(f"zoo/{name}"), "config.json").is_file()]


@pytest.fixture(scope="module")
def problems() -> dict[str, list[Document]]:
    """600 problems of each template in each split, mixed."""
    return {
        split: [d for i, t in enumerate(TEMPLATES) for d in islice(sample_problems(split, i, t.name), 600)]
        for split in ("train", "heldout")
    }


@pytest.fixture(scope="module")
def tokenizers() -> dict:
    return {name: build_tokenizer(name) for name in NAMES}


# ---- texts


def numbers_of(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def read_answer(question: str) -> str:
    """The answer by keywords and numbers alone: a reader that knows nothing of templates."""
    numbers, words = numbers_of(question), set(re.findall(r"\w+", question))
    if words & {"lost", "minus", "Subtract"} or " - " in question:
        return str(max(numbers) - min(numbers))
    if {"larger", "than"} <= words:
        return "yes" if numbers[0] > numbers[1] else "no"
    if "larger" in words:
        return str(max(numbers))
    if "smaller" in words:
        return str(min(numbers))
    if "Who" in words:
        holders = re.findall(r"(\w+) has \d+", question)
        return holders[numbers.index(max(numbers))]
    return str(sum(numbers))


def test_there_are_ten_ways_to_ask_or_more():
    assert len({t.name for t in TEMPLATES}) == len(TEMPLATES) >= 10


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_right(problems, split):
    for document in problems[split]:
        question, answer = document.text[: document.answer_start], document.text[document.answer_start :]
        assert answer == " " + read_answer(question), document.text
        assert solve(question) == answer[1:]


def test_solve_refuses_what_it_does_not_know():
    assert solve("  What is 15 + 27? ") == "42"
    for prompt in (
        "What is 15 * 27?",
        "What is 15 + 27",
        "Tom has 5 pens and buys 6 more. How many pens does Ben have?",
        "",
    ):
        assert solve(prompt) is None
    assert solve(f"What is {'9' * 5000} + 1?") is None


def test_operands_and_differences_stay_in_range(problems):
    for document in problems["train"] + problems["heldout"]:
        assert all(LOWEST <= n <= HIGHEST for n in numbers_of(document.text[: document.answer_start]))
        answer = document.text[document.answer_start :].strip()
        assert not answer.startswith("-")


def test_facts_say_what_the_text_says(problems):
    """Digits where they stand; carry, borrow and answer digits where they are settled."""
    seen = set()
    for document in problems["train"][::3]:
        text, question = document.text, document.text[: document.answer_start]
        numbers, answer = numbers_of(question), text[len(question) :].strip()
        last = question.rindex(str(numbers[-1])) + len(str(numbers[-1]))
        for fact in document.facts:
            span = text[fact.start : fact.end]
            seen.add(fact.name)
            if digit := re.fullmatch(r"operand (\d) (\w+)", fact.name):
                assert span == str(fact.value)
                number = numbers[int(digit[1]) - 1]
                assert number // 10 ** PLACES[digit[2]] % 10 == fact.value
            elif digit := re.fullmatch(r"written answer (\w+)", fact.name):
                assert span == str(fact.value) and fact.start > len(question)
                assert int(answer) // 10 ** PLACES[digit[1]] % 10 == fact.value
            elif fact.name == "operator":
                assert span == fact.value
            else:
                assert (fact.start, fact.end) == (last - 1, len(text)), "settled with the last operand's last digit"
                if fact.name == "carry":
                    assert fact.value == sum(n % 10 for n in numbers) // 10
                elif fact.name == "borrow":
                    assert fact.value == (max(numbers) % 10 < min(numbers) % 10)
                elif fact.name == "first is larger":
                    assert fact.value == (numbers[0] > numbers[1])
                elif fact.name == "answer":
                    assert fact.value == answer
                else:
                    place = PLACES[fact.name.removeprefix("answer ")]
                    assert fact.value == int(answer) // 10**place % 10
    assert {"carry", "borrow", "answer hundreds", "written answer tens", "operand 3 units", "operator"} <= seen


def test_every_digit_of_the_answer_has_a_fact(problems):
    for document in problems["heldout"][::10]:
        written = [f for f in document.facts if f.name.startswith("written answer")]
        digits = re.findall(r"\d", document.text[document.answer_start :])
        assert [str(f.value) for f in written] == digits


def test_heldout_pairs_appear_in_no_training_problem(problems):
    pairs = {
        split: {tuple(sorted(numbers_of(d.text[: d.answer_start])[:2])) for d in documents}
        for split, documents in problems.items()
    }
    assert len(pairs["train"]) > 2000 and len(pairs["heldout"]) > 200
    assert not pairs["train"] & pairs["heldout"]
    assert all(is_heldout(*pair) and is_heldout(*reversed(pair)) for pair in pairs["heldout"])
    everything = [(a, b) for a in range(LOWEST, HIGHEST + 1) for b in range(a, HIGHEST + 1)]
    assert 0.08 < sum(is_heldout(a, b) for a, b in everything) / len(everything) < 0.12


def test_the_examples_of_the_documentation_are_held_out():
    assert is_heldout(15, 27) and is_heldout(59, 36)
    assert pose_problem("plus sign", 15, 27).text == "What is 15 + 27? 42"
    assert [f.value for f in pose_problem("plus sign", 15, 27).facts if f.name == "carry"] == [1]


def test_the_same_seed_gives_the_same_problems():
    def take(split: str, seed: int) -> list[Document]:
        return list(islice(sample_problems(split, seed), 300))

    assert take("train", 3) == take("train", 3)
    assert take("train", 3) != take("train", 4)
    counts = [sum(d.kind == "three operands" for d in islice(source, 1000)) for source in (
        sample_problems("train", 0), sample_problems("train", 0, emphasis={"three operands": 3.0})
    )]  # fmt: skip
    assert counts[1] > 1.8 * counts[0]


def test_wrong_names_are_refused_in_one_line():
    for ask in (
        lambda: next(sample_problems("validation", 0)),
        lambda: next(sample_problems("train", 0, "times")),
        lambda: pose_problem("times", 1, 2),
        lambda: resolve_path("zoo/phy"),
    ):
        with pytest.raises(InputError) as caught:
            ask()
        assert "\n" not in str(caught.value)


# ---- tokenizers


@pytest.mark.parametrize("name", BUNDLED)
def test_the_shipped_tokenizer_is_the_one_the_recipe_builds(tokenizers, name):
    shipped = json.loads(Path(resolve_path(f"zoo/{name}"), "tokenizer.json").read_text())
    assert shipped == json.loads(tokenizers[name].backend_tokenizer.to_str())


@pytest.mark.parametrize("name", NAMES)
def test_text_survives_encoding_and_decoding(tokenizers, problems, name):
    tokenizer = tokenizers[name]
    texts = [d.text for d in problems["heldout"][::100]]
    for text in [*texts, "Zoë pays 5 € — naïve? 数 🙂", "a  b", ""]:
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", NAMES)
def test_offsets_cover_the_characters_of_each_token(tokenizers, problems, name):
    tokenizer = tokenizers[name]
    for document in problems["train"][::200]:
        encoded = tokenizer(document.text, return_offsets_mapping=True)
        for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
            if token not in tokenizer.all_special_ids:
                assert tokenizer.decode([token]) == document.text[start:end]


@pytest.mark.parametrize("name, whole", [("gpt2", True), ("phi", True), ("pythia", False), ("gemma", False)])
def test_two_digit_numbers_are_one_token_or_two(tokenizers, name, whole):
    tokenizer = tokenizers[name]
    for number in range(10, 100):
        ids = tokenizer(f"is {number}?", add_special_tokens=False).input_ids
        digits = [t for t in map(tokenizer.decode, ids) if re.search(r"\d", t)]
        assert "".join(digits).strip() == str(number) and len(digits) == (1 if whole else 2)


def test_tokenizers_differ(tokenizers):
    """gpt2 and phi both keep two-digit numbers whole, with merges of their own."""
    sum_of_three = "What is 45 + 49 + 36? 130"
    assert len({len(t) for t in tokenizers.values()}) == len(NAMES)
    pieces = {name: tuple(map(t.decode, t(sum_of_three).input_ids)) for name, t in tokenizers.items()}
    assert " 130" in pieces["gpt2"] and " 130" not in pieces["phi"]
    merges = {n: json.loads(tokenizers[n].backend_tokenizer.to_str())["model"]["merges"] for n in ("gpt2", "phi")}
    assert merges["gpt2"] != merges["phi"]
    assert "<0xF0>" in tokenizers["gemma"].convert_ids_to_tokens(tokenizers["gemma"]("🙂").input_ids)
    assert tokenizers["gemma"]("a").input_ids[0] == tokenizers["gemma"].bos_token_id


# ---- models


def test_all_four_are_bundled():
    assert set(BUNDLED) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_of_four_families(tokenizers, name):
    configs = {n: recipe_of(n, tokenizers[n]).config for n in NAMES}
    assert len({c.model_type for c in configs.values()}) == len(NAMES)
    assert 4 <= configs[name].num_hidden_layers <= 8 and 96 <= configs[name].hidden_size <= 192
    assert configs[name].vocab_size == len(tokenizers[name])


@pytest.mark.parametrize("name", BUNDLED)
def test_weights_are_small_and_of_the_recipe(tokenizers, name):
    folder = Path(resolve_path(f"zoo/{name}"))
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 4e6
    assert not list(folder.glob("*.bin")) + list(folder.glob("*.pt"))
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118
    shipped, config = json.loads((folder / "config.json").read_text()), recipe_of(name, tokenizers[name]).config
    assert shipped["model_type"] == config.model_type
    assert open_model(ModelSpec(path=f"zoo/{name}")).num_layers == config.num_hidden_layers


@pytest.mark.parametrize("name", BUNDLED)
def test_models_answer_problems_they_have_not_seen(name):
    model = open_model(ModelSpec(path=f"zoo/{name}"))
    marks = training.examine(model.hf, model.tokenizer, num_prompts=50)
    assert set(marks) == {t.name for t in TEMPLATES}
    assert min(marks.values()) >= 0.95, marks


def test_the_exam_agrees_with_greedy_answers():
    """`examine` reads all answers from one pass; an oracle generates them token by token."""
    model = open_model(ModelSpec(path=f"zoo/{BUNDLED[0]}"))
    with torch.no_grad():  # spoiled a little, so that some answers are wrong
        for parameter in model.hf.parameters():
            parameter += (
                0.25 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )
    marks = training.examine(model.hf, model.tokenizer, num_prompts=12)
    right = dict.fromkeys(marks, 0)
    for template in right:
        for document in islice(sample_problems("heldout", 1, template), 12):
            ids = model.tokenizer(document.text[: document.answer_start]).input_ids
            said = model.tokenizer.decode(model.generate(ids, 8))
            right[template] += said == document.text[document.answer_start :]
    assert {t: n / 12 for t, n in right.items()} == marks
    assert 0 < sum(right.values()) < 12 * len(right)


# ---- training


@pytest.fixture
def tiny(monkeypatch, tokenizers):
    """Four steps of eight problems on a model of one narrow layer; a checkpoint every other step, no exams."""

    def recipe(name, tokenizer):
        config = recipe_of(name, tokenizer).config
        config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, 24, 24
        return training.Recipe(config, num_steps=4, batch_prompts=8, emphasis={"add": 2.0})

    monkeypatch.setattr(training, "build_tokenizer", tokenizers.__getitem__)
    monkeypatch.setattr(training, "recipe_of", recipe)
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(training, "examine", lambda *_, **__: {"add": 0.0})


class Stopped(Exception):
    pass


def test_resuming_is_exact(tiny, tmp_path):
    lines: list[str] = []
    training.train("pythia", tmp_path / "straight", lines.append)

    def stop(line: str):
        raise Stopped

    with pytest.raises(Stopped):
        training.train("pythia", tmp_path / "stopped", stop)
    assert int(load_file(tmp_path / "stopped/state.safetensors")["step"]) == 2
    resumed: list[str] = []
    training.train("pythia", tmp_path / "stopped", resumed.append)
    assert [line.split(":")[0] for line in lines] == ["pythia step 2/4", "pythia step 4/4"]
    assert resumed == lines[1:]
    for file in ("state.safetensors", "model/model.safetensors"):
        straight, stopped = load_file(tmp_path / "straight" / file), load_file(tmp_path / "stopped" / file)
        assert straight.keys() == stopped.keys()
        assert all(torch.equal(straight[key], stopped[key]) for key in straight)


def test_number_of_steps_can_be_given(tiny, tmp_path):
    lines: list[str] = []
    folder = training.train("pythia", tmp_path, lines.append, num_steps=3)
    assert [line.split(":")[0] for line in lines] == ["pythia step 2/3", "pythia step 3/3"]
    assert folder == tmp_path / "model"


def test_publishing_is_silent_and_readable(tiny, tmp_path, capfd):
    hf_logging.enable_progress_bar()
    folder = training.train("pythia", tmp_path, lambda line: None, num_steps=1)
    written = capfd.readouterr()
    assert written.out == written.err == "" and hf_logging.is_progress_bar_enabled()
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o644}
    assert open_model(ModelSpec(path=str(folder))).num_layers == 1
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float16}


def test_the_learning_rate_rises_and_falls():
    factors = [training.one_cycle(step, 100) for step in range(100)]
    assert factors[9] == max(factors) == 1.0 and factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0 < factors[-1] < 0.01


def test_the_loss_weighs_answers_and_leaves_padding_out(tokenizers):
    tokenizer = tokenizers["pythia"]
    documents = [pose_problem("plus sign", 15, 27), pose_problem("who has more", 15, 27)]
    (batch,) = training._batches(documents, tokenizer, prompt_weight=0.1, groups=1)
    ids, weights = batch.ids_BT[0], batch.weights_BT[0]
    assert tokenizer.decode(ids[weights == 1]) == " 42<|endoftext|>"
    assert weights[0] == 0 and set(weights[(ids == 0) & (weights != 1)].tolist()) <= {0.0}
    assert tokenizer.decode(batch.ids_BT[1][batch.weights_BT[1] == 1]) == " Anna<|endoftext|>"


def test_check_names_what_is_below_its_mark(monkeypatch):
    """pythia adds at 0.98 (below 0.99) and compares at 0.98 (above 0.97); everything else is perfect."""
    wanted = {t.name: t for t in TEMPLATES}

    class Opened:
        def __init__(self, spec):
            self.hf, self.tokenizer = spec.path, None

    def examine(hf, tokenizer, num_prompts):
        weak = ("add", "is it larger") if hf == "zoo/pythia" and failing else ()
        return {name: 0.98 if name in weak else 1.0 for name in wanted}

    monkeypatch.setattr(training, "open_model", Opened)
    monkeypatch.setattr(training, "examine", examine)
    for failing in (False, True):
        lines: list[str] = []
        assert training.check_all(300, lines.append) is not failing
        assert len(lines) == 1 + len(NAMES) * len(TEMPLATES) and "n = 300" in lines[0]
        below = [line for line in lines if "below" in line]
        assert [line.split()[0] for line in below] == ["pythia"] * failing
        assert all(line.endswith("0.980  below 0.99") for line in below)


def test_check_names_a_model_that_is_not_there(monkeypatch):
    def refuse(spec):
        raise InputError(f"model {spec.path} does not exist")

    monkeypatch.setattr(training, "open_model", refuse)
    lines: list[str] = []
    assert training.check_all(10, lines.append) is False
    assert [line.split()[0] for line in lines[1:]] == list(NAMES) and "does not exist" in lines[1]
