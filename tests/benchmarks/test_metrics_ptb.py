"""The tokenizer against Stanford's: recorded answers always, the Java program itself where there is Java."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from edgecap.benchmarks.metrics import ptb_tokenize

# Hard strings and what `PTBTokenizer -preserveLines -lowerCase` of CoreNLP 3.4.1 makes of them, punctuation dropped.
RECORDED: dict[str, list[str]] = json.loads(Path(__file__).with_name("ptb_hard.json").read_text(encoding="utf-8"))

SENTENCES = (
    "a man in a red shirt is riding a bike down the street",
    "two dogs run through the tall grass near an old wooden fence",
    "the girl holds an umbrella while it rains on Main Street",
    "A skier jumps off a snowy hill with 3 people watching",
    "Children play soccer at the U.S. Open in New York",
)
ENDINGS = (
    "'s",
    "s'",
    ",",
    ".",
    "!",
    "?",
    "...",
    ";",
    ":",
    "-like",
    "/dog",
    "n't",
    "'ll",
    "'re",
    " &",
    " -",
    " --",
    "'",
    "%",
)
WRAPS = (
    '"{}"',
    "'{}'",
    "({})",
    "[{}]",
    "“{}”",
    "‘{}’",
    "#{}",
    "@{}",
    "${}",
    "-{}",
    "1{}",
    "5-{}",
    "{}-5",
    "{}'s-{}",
    "{}.{}",
)


def java_tokens(captions: list[str], folder: Path) -> list[list[str]]:
    """What pycocoevalcap's tokenizer gives for each caption; skips where it cannot run."""
    package = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="pycocoevalcap is not installed")
    if shutil.which("java") is None:
        pytest.skip("no java on the PATH: the tokenizer is compared with recorded answers only")
    source = folder / "captions.txt"
    source.write_bytes("".join(caption + "\n" for caption in captions).encode())
    jar = Path(package.__file__).with_name(package.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    run = subprocess.run([*command, str(source)], capture_output=True, check=True)
    lines = run.stdout.decode().split("\n")[:-1]
    assert len(lines) == len(captions)
    return [[w for w in line.split(" ") if w and w not in package.PUNCTUATIONS] for line in lines]


def dressed(count: int, seed: int) -> list[str]:
    """Sentences with a word or two dressed in punctuation, as people type it."""
    rng = random.Random(seed)
    captions = []
    for _ in range(count):
        words = rng.choice(SENTENCES).split()
        for at in rng.sample(range(len(words)), k=2):
            if rng.random() < 0.6:
                words[at] += rng.choice(ENDINGS)
            else:
                words[at] = rng.choice(WRAPS).replace("{}", words[at])
        captions.append(" ".join(words) + rng.choice((".", " .", "", "!")))
    return captions


@pytest.mark.parametrize("caption", RECORDED, ids=range(len(RECORDED)))
def test_recorded_answers(caption: str) -> None:
    assert ptb_tokenize(caption) == RECORDED[caption]


def test_line_breaks_are_spaces() -> None:
    assert ptb_tokenize("a dog\nruns\r\nfast\u2028now") == ["a", "dog", "runs", "fast", "now"]


@pytest.mark.parametrize("text", ["ऽ!", "\u0301!", "a-", "a.", "ab.c-", "a'", "<a ", "1,", "a@", "e'er", "n't"])
def test_long_nonsense_takes_no_long_time(text: str) -> None:
    start = time.process_time()
    ptb_tokenize(text[:-1] * 60 + text[-1:] * 200 + text * 200)
    assert time.process_time() - start < 2  # milliseconds, unless a pattern backtracks without end


def test_the_result_may_be_changed_by_its_owner() -> None:
    ptb_tokenize("a dog").append("spoiled")
    assert ptb_tokenize("a dog") == ["a", "dog"]


def test_recorded_answers_are_javas(tmp_path: Path) -> None:
    assert java_tokens(list(RECORDED), tmp_path) == list(RECORDED.values())


def test_dressed_sentences_are_as_in_java(tmp_path: Path) -> None:
    captions = dressed(4000, seed=0)
    theirs = java_tokens(captions, tmp_path)
    different = [(c, ptb_tokenize(c), t) for c, t in zip(captions, theirs, strict=True) if ptb_tokenize(c) != t]
    assert not different[:5], f"{len(different)} of {len(captions)} differ"
