"""Tastes of an answer that a program can measure, and the utility a user with such tastes has.

Simulated users need a hidden factor whose effect on a text can be counted rather than judged.
A taste is one such count, f_k(text). A user is a weight per taste, and their utility for a text is

    u(text) = sum_k w_k * (f_k(text) - mean_k) / std_k

with mean_k and std_k taken over a corpus of answers, so that a weight of 1 means the same for
every taste: one unit of utility per standard deviation. Differences of u are what the
Bradley-Terry-Luce choice of METHOD.md section 2 consumes.

Beside the tastes stand two measures of degenerate text, `repetition` and `has_loop`: a taste
that is reached by a broken text does not count.

Everything here is deterministic, takes about linear time in the text, and is defined for every
string, the empty one included. "Words" are runs between white space and dashes, stripped of
punctuation, case-folded, and without list markers, so that turning prose into a list does not
change them. A script written without spaces therefore counts as few words.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_EXCLAMATIONS = 3
"""Exclamation marks beyond this many in one sentence add nothing to `enthusiasm`."""

_BULLET = r"[-*+•‣◦▪●–]"
_NUMBER = r"\(?(?:\d{1,3}[.)]|[A-Za-z]\))"
_LIST_MARKER = re.compile(rf"\s*(?:{_BULLET}\s+|(?:[*_]{{2}})?{_NUMBER}(?:[*_]{{2}})?\s+)")
_WORD_GAP = re.compile(r"[\s—–]+")
_SENTENCE_END = re.compile(r"([.!?…。！？؟]+)[\"'”’»)\]*_]*")
_SPACE = re.compile(r"\s*")
_UNSPACED_END = frozenset("。！？")
_SOFT_END = frozenset(".…")
_ABBREVIATIONS = frozenset(("mr", "mrs", "ms", "dr", "prof", "st", "vs", "e.g", "i.e"))
_QUESTION_MARKS = frozenset("?？؟")
_EXCLAMATION_MARKS = frozenset("!！")

_NEUTRAL_WORDS = 10
_LONG_WORD_LETTERS = 9
_LONG_WORD_SCORE = 0.25
_CONTRACTION = re.compile(r"[^\W\d_]+(?:n't|'re|'ve|'ll|'d|'m)")
# Contractions in 's are listed because a bare 's is as often a possessive.
_CASUAL = frozenset(
    (
        *("you", "your", "yours", "yourself", "yourselves", "y'all", "u", "ya"),
        *("it's", "that's", "he's", "she's", "there's", "here's", "let's", "what's", "who's"),
        *("where's", "how's", "when's", "why's", "gonna", "wanna", "gotta", "kinda", "sorta"),
        *("dunno", "cuz", "hey", "hi", "yeah", "yep", "nope", "nah", "ok", "okay", "wow", "oh"),
        *("oops", "huh", "yay", "haha", "lol", "btw", "dude", "guys", "folks", "buddy", "stuff"),
        *("bunch", "tons", "lots", "awesome", "super", "totally", "crazy", "yummy"),
    )
)
_CONNECTIVES = frozenset(
    (
        *("therefore", "thus", "hence", "thereby", "whereby", "consequently", "accordingly"),
        *("subsequently", "moreover", "furthermore", "additionally", "likewise", "similarly"),
        *("however", "nevertheless", "nonetheless", "conversely", "whereas", "albeit"),
        *("notwithstanding", "regarding", "concerning", "namely", "specifically", "ultimately"),
    )
)

# Under this many characters a repeated tail is as likely an "ooo" or a "..." as a loop.
_MIN_LOOP_CHARACTERS = 24
_LOOP_REPEATS = 3
# Below this weight `describe` marks a taste as mild. It lies between 1/2 and 1/sqrt(2), so that
# an even mixture of two unit tastes is not mild and a half-strength taste is.
_MILD_BELOW = 0.6


@dataclass(frozen=True)
class Taste:
    """One measurable taste.

    Attributes:
        name: its key in `TASTES`.
        low: what a text with a small measure is like, for people ("short").
        high: what a text with a large measure is like ("long").
        measure: text -> f(text), finite for every string.
    """

    name: str
    low: str
    high: str
    measure: Callable[[str], float]


def length(text: str) -> float:
    """log(1 + number of words): 0 for a text without words, +0.69 for each doubling.

    The logarithm keeps one runaway answer from dominating a corpus.
    """
    return math.log1p(len(_words(text)))


def lists(text: str) -> float:
    """Share of the non-empty lines that are list items, in [0, 1]; 0 for a text without lines.

    An item starts with a bullet (- * + • ...), a number ("1." "1)" "(1)", also bold) or a letter
    with a bracket ("a)"), then white space and at least one letter or digit. A horizontal rule
    and an enumeration inside a line are not items.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return 0.0
    return sum(_list_marker_end(line) > 0 for line in lines) / len(lines)


def enthusiasm(text: str) -> float:
    """Mean over sentences of min(exclamation marks, 3), in [0, 3]; 0 without sentences.

    The cap applies to each sentence, so that one shouted line in a calm text stays one line.
    """
    sentences = _sentences(text)
    if not sentences:
        return 0.0
    marks = (sum(c in _EXCLAMATION_MARKS for c in sentence) for sentence, _ in sentences)
    return sum(min(count, MAX_EXCLAMATIONS) for count in marks) / len(sentences)


def questions(text: str) -> float:
    """Share of the sentences whose closing punctuation has a question mark, in [0, 1].

    A text without sentences has 0.
    """
    sentences = _sentences(text)
    if not sentences:
        return 0.0
    asked = sum(not _QUESTION_MARKS.isdisjoint(end) for _, end in sentences)
    return asked / len(sentences)


def formality(text: str) -> float:
    """sum of the word scores / (number of words + 10), in (-1, 1); 0 for a text without words.

    The ten neutral words keep an answer of one or two words from being extreme. Each word scores
    once, by the first line that fits:
        -1    contraction ("don't"), second person ("your") or colloquial word ("gonna")
        +1    formal connective ("therefore")
        +1/4  long word: 9 letters or more
         0    any other

    A long word scores less than a connective because long words are also a matter of subject.
    An index for ranking answers to one prompt, not a linguistic claim; English only.
    """
    words = _words(text)
    return math.fsum(map(_formality_score, words)) / (len(words) + _NEUTRAL_WORDS)


TASTES: dict[str, Taste] = {
    taste.name: taste
    for taste in (
        Taste("length", "short", "long", length),
        Taste("lists", "prose", "lists", lists),
        Taste("enthusiasm", "calm", "enthusiastic", enthusiasm),
        Taste("questions", "no questions", "questions", questions),
        Taste("formality", "casual", "formal", formality),
    )
}
"""Every taste by name."""


def measure(text: str, names: Sequence[str]) -> list[float]:
    """Measure a text on several tastes.

    Args:
        text: any string.
        names: keys of `TASTES`, without duplicates.

    Returns:
        f_k(text) for every name k, in the order of `names`.

    Raises:
        TypeError: `text` is not a string, or `names` is one.
        ValueError: `names` is empty, repeats a name or has one that is not in `TASTES`.
    """
    _check_text(text)
    return [TASTES[name].measure(text) for name in _checked_names(names)]


@dataclass(frozen=True)
class TasteScale:
    """Mean and standard deviation of some tastes over a corpus: the units of a utility.

    Attributes:
        names: K keys of `TASTES`.
        mean: K finite numbers, in the order of `names`.
        std: K finite positive numbers.

    Raises:
        TypeError: `names` is a string.
        ValueError: a name is unknown or repeated, or a length or number is not as above.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        _checked_names(self.names)
        for field, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != len(self.names):
                raise ValueError(
                    f"{field}: expected {len(self.names)} numbers, one for each of "
                    f"{list(self.names)}; got {len(values)}"
                )
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"{field}: expected finite numbers; got {list(values)}")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected positive numbers; got {list(self.std)}")

    @classmethod
    def fit(cls, texts: Iterable[str], names: Sequence[str]) -> TasteScale:
        """Take the mean and the population standard deviation of each taste over a corpus.

        A taste on which all texts agree gets std = 1: the corpus gives it no unit, and its
        measure is then only centred.

        Args:
            texts: at least one string.
            names: keys of `TASTES`, without duplicates.

        Raises:
            TypeError: `texts` or `names` is a string, or a text is not one.
            ValueError: `texts` is empty, or `names` as in `measure`.
        """
        if isinstance(texts, str):
            raise TypeError("texts: expected several strings; got one string")
        checked = _checked_names(names)
        columns = list(zip(*(measure(text, checked) for text in texts), strict=True))
        if not columns:
            raise ValueError("texts: expected at least one text; got none")
        mean = tuple(math.fsum(column) / len(column) for column in columns)
        std = tuple(_std(column, centre) for column, centre in zip(columns, mean, strict=True))
        return cls(checked, mean, std)

    def standardise(self, text: str) -> list[float]:
        """(f_k(text) - mean_k) / std_k for every name k, in the order of `names`.

        Raises:
            TypeError: `text` is not a string.
        """
        return [
            (value - mean) / std
            for value, mean, std in zip(measure(text, self.names), self.mean, self.std, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists for JSON: {"names": [...], "mean": [...], "std": [...]}."""
        return {"names": list(self.names), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TasteScale:
        """Inverse of `to_dict`.

        Raises:
            ValueError: the keys are not exactly names, mean and std, or as for the class.
        """
        if set(data) != {"names", "mean", "std"}:
            raise ValueError(f"data: expected the keys names, mean, std; got {sorted(data)}")
        return cls(
            tuple(data["names"]),
            tuple(float(value) for value in data["mean"]),
            tuple(float(value) for value in data["std"]),
        )


def utility(weights: Mapping[str, float], text: str, scale: TasteScale) -> float:
    """sum_k w_k * (f_k(text) - mean_k) / std_k, the utility of a text for a user.

    Args:
        weights: w_k by taste name; a taste of the scale that is left out has weight 0.
        text: any string.
        scale: units, with at least the tastes of `weights`.

    Raises:
        TypeError: `text` is not a string.
        ValueError: a taste is unknown or not in the scale, or a weight is not finite.
    """
    _check_weights(weights)
    missing = [name for name in weights if name not in scale.names]
    if missing:
        raise ValueError(
            f"weights: expected tastes of the scale, {list(scale.names)}; got {missing}"
        )
    values = dict(zip(scale.names, scale.standardise(text), strict=True))
    return math.fsum(weight * values[name] for name, weight in weights.items())


def describe(weights: Mapping[str, float]) -> str:
    """A short phrase for a user's weights: {"length": -1, "lists": 1} -> "short, lists".

    The sign picks the low or the high description, larger weights come first (equal ones in the
    order given), weights of 0 are left out and those below 0.6 are marked "(mildly)". With
    nothing left the phrase is "no preference".

    Raises:
        ValueError: a taste is unknown or a weight is not finite.
    """
    _check_weights(weights)
    phrases = []
    for name, weight in sorted(weights.items(), key=lambda item: -abs(item[1])):
        if weight == 0:
            continue
        phrase = TASTES[name].high if weight > 0 else TASTES[name].low
        phrases.append(f"{phrase} (mildly)" if abs(weight) < _MILD_BELOW else phrase)
    return ", ".join(phrases) or "no preference"


def repetition(text: str) -> float:
    """Share of the word 4-grams that have occurred before in the text, in [0, 1).

    1 - distinct / total, and 0 for fewer than four words.

    Raises:
        TypeError: `text` is not a string.
    """
    _check_text(text)
    words = _words(text)
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def has_loop(text: str) -> bool:
    """Whether the text ends in a phrase or line repeated at least three times in a row.

    Words are compared, so case, punctuation and the numbers of list items do not hide a loop;
    the last copy may be cut anywhere as long as three copies' worth is there. Characters are
    compared too, for a tail without words or cut inside one, if the tail has at least 24 of them.

    Raises:
        TypeError: `text` is not a string.
    """
    _check_text(text)
    words = _words(text)
    return (
        _tail_loops(words, 1)
        or _tail_loops(" ".join(words), _MIN_LOOP_CHARACTERS)
        or _tail_loops(text.strip(), _MIN_LOOP_CHARACTERS)
    )


def _tail_loops(items: Sequence[str], min_span: int) -> bool:
    """Whether, for some p, at least the last max(3 p, min_span) items have period p."""
    if len(items) < min_span:
        return False
    r = items[::-1]
    # Trying every p is no worse than n log n: were long matches found at many p, two of them
    # would lie so close that the items they share have a short period, a loop found before.
    return any(
        all(r[i] == r[i + p] for i in range(max(_LOOP_REPEATS * p, min_span) - p))
        for p in range(1, len(r) // _LOOP_REPEATS + 1)
    )


def _list_marker_end(line: str) -> int:
    """Where the content of a list item starts, or 0 if the line is none."""
    match = _LIST_MARKER.match(line)
    if match is None or not any(c.isalnum() for c in line[match.end() :]):
        return 0
    return match.end()


def _words(text: str) -> list[str]:
    words = []
    for line in unicodedata.normalize("NFC", text).splitlines():
        for token in _WORD_GAP.split(line[_list_marker_end(line) :]):
            word = _strip_punctuation(token)
            if word:
                words.append(word.casefold().replace("’", "'"))
    return words


def _strip_punctuation(token: str) -> str:
    inside = [i for i, c in enumerate(token) if c.isalnum()]
    return token[inside[0] : inside[-1] + 1] if inside else ""


def _sentences(text: str) -> list[tuple[str, str]]:
    """The sentences that have a letter or digit, each with its closing punctuation.

    A sentence ends with its line, or at a run of . ! ? … that white space or an emoji follows.
    A run of dots ends none before a lower-case letter ("e.g. this") or after a title ("Dr. Who").
    """
    sentences = []
    for line in text.splitlines():
        start = _list_marker_end(line)
        for match in _SENTENCE_END.finditer(line, start):
            if _ends_sentence(line, start, match):
                sentences.append((line[start : match.end()], match[1]))
                start = match.end()
        sentences.append((line[start:], ""))
    return [pair for pair in sentences if any(c.isalnum() for c in pair[0])]


def _ends_sentence(line: str, start: int, match: re.Match[str]) -> bool:
    if not _UNSPACED_END.isdisjoint(match[1]):
        return True
    following = _SPACE.match(line, match.end())
    assert following is not None  # the pattern also matches nothing
    if following.end() == len(line):
        return True
    if following.end() == match.end():
        return unicodedata.category(line[match.end()]) == "So"
    if not _SOFT_END.issuperset(match[1]):
        return True
    # Looking back further than the longest abbreviation would make many titles quadratic.
    before = line[max(start, match.start() - 8) : match.start()].split()
    title = bool(before) and before[-1].lstrip("(\"'“‘*_").lower() in _ABBREVIATIONS
    return not title and not line[following.end()].islower()


def _formality_score(word: str) -> float:
    if word in _CASUAL or _CONTRACTION.fullmatch(word):
        return -1.0
    if word in _CONNECTIVES:
        return 1.0
    return _LONG_WORD_SCORE if sum(c.isalpha() for c in word) >= _LONG_WORD_LETTERS else 0.0


def _std(values: Sequence[float], mean: float) -> float:
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    # Rounding of the mean leaves about 1e-16 where all values are equal.
    return std if std > 1e-12 * max(1.0, abs(mean)) else 1.0


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text: expected a string; got {type(text).__name__}")


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"names: expected several names; got the string {names!r}")
    checked = tuple(names)
    unknown = [name for name in checked if name not in TASTES]
    if unknown:
        raise ValueError(f"names: expected tastes out of {list(TASTES)}; got {unknown}")
    if not checked or len(set(checked)) < len(checked):
        raise ValueError(f"names: expected distinct names, at least one; got {list(checked)}")
    return checked


def _check_weights(weights: Mapping[str, float]) -> None:
    unknown = [name for name in weights if name not in TASTES]
    if unknown:
        raise ValueError(f"weights: expected tastes out of {list(TASTES)}; got {unknown}")
    infinite = {name: weight for name, weight in weights.items() if not math.isfinite(weight)}
    if infinite:
        raise ValueError(f"weights: expected finite numbers; got {infinite}")
