"""Penn Treebank tokens as the COCO caption evaluation makes them, without Java.

pycocoevalcap runs Stanford CoreNLP 3.4.1's `PTBTokenizer -preserveLines -lowerCase` and drops a list of punctuation
tokens. This module was written from the observed behaviour of that program: every rule below answers something it
does. Equal on all 40,000 Flickr8k captions and on the hard cases of tests/benchmarks/test_metrics_ptb.py. Known differences:
"""

from __future__ import annotations

import re
from functools import lru_cache

# Dropped after tokenising. The brackets are listed in capitals there but lower-cased before, so they stay: "-lrb-".
PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())

APOSTROPHE = "['’\x92]"
CLITIC = rf"{APOSTROPHE}(?:s|m|d|re|ve|ll|S|M|D|RE|VE|LL)(?![^\W_])"
# Abbreviations that keep their full stop wherever they stand, and those that keep it before a number only.
ABBREVIATIONS = (
    "mr|mrs|ms|messrs|dr|drs|prof|gen|sgt|capt|cpt|cmdr|lt|col|maj|cpl|pvt|adm|rev|hon|rep|sen|gov|pres|st|mt|ft|dept|univ"
    "|jr|sr|bros|inc|co|cos|corp|ltd|ave|blvd|rd|etc|vs|tel|ext|est|pp|ph\\.d|cf|al"
    "|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thur|thurs|fri"
)
SPLIT = {
    word: tuple(parts.split())
    for word, parts in {
        "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me", "gimme": "gim me",
        "'tis": "'t is", "'twas": "'t was", "more'n": "more 'n",
    }.items()
}  # fmt: skip

TOKEN = re.compile(
    rf"""
    (?P<markup> </?[A-Za-z!?][^<>\n]*> )
  | (?P<address> https?://[^\s"<>|(){{}}]*[^\s"<>|(){{}}.,!?;:'\-]
      | (?:[A-Za-z0-9][\w+%\-]*(?:\.[\w+%\-]+)*@[A-Za-z0-9\-]+(?:\.[A-Za-z0-9\-]+)*)
      | (?:www\.)?(?:[A-Za-z0-9\-]+\.)+(?:com|net|org|edu|gov)\b(?:/[^\s"<>|()]*[^\s"<>|().,!?;:'\-])?
      | [@\#](?=[A-Za-z_])\w+ )
  | (?P<entity> &(?:amp|lt|gt|quot|apos|nbsp);|&\#\d+; )
  | (?P<initials> (?:[A-Za-z]\.)+(?:[A-Za-z](?![\w.]))? )
  | (?P<abbreviation> (?i:{ABBREVIATIONS})\.(?=\W|$) | (?i:nos?|p|pp|art)\.(?=\s*\d) )
  | (?P<company> [A-Z]+(?:&[A-Z]+)+ )
  | (?P<whole> (?i:cannot|gonna|gotta|wanna|lemme|gimme|{APOSTROPHE}tis|more{APOSTROPHE}n)(?![^\W_]) | {APOSTROPHE}[Tt]was )
  | (?P<not> [^\W\d_]+?(?=[Nn]{APOSTROPHE}[Tt](?![^\W_])) | [Nn]{APOSTROPHE}[Tt](?![^\W_]) )
  | (?P<clitic> {CLITIC} | {APOSTROPHE}(?:n{APOSTROPHE}? | em | cause | \d\ds?)(?![^\W_]) )
  | (?P<elided> [dloDLO]{APOSTROPHE}[^\W\d_]+ | [Mm]a{APOSTROPHE}am | (?:[Nn]?[Ee]){APOSTROPHE}er | [Yy]{APOSTROPHE}(?=all) | ol{APOSTROPHE} )
  | (?P<number> [+\-]?(?:\d+(?:[.,:/]\d+)+(?:-\d+/\d+)?|\.\d+)(?![^\W\d_-]) | [+\-]\d+(?!\w) )
  | (?P<word> [^\W_]+(?:_[^\W_]+)*(?:[\-/.]?(?<!\d\.)[^\W_]+(?:_[^\W_]+)*)* )
  | (?P<dots> \.\.\.+ )
  | (?P<marks> [?!]+ )
  | (?P<dashes> --+ )
  | (?P<other> \S )
    """,
    re.VERBOSE,
)
REWRITTEN = {
    '"': "''", "“": "``", "”": "''", "‘": "`", "’": "'", "«": "``", "»": "''", "‹": "`", "›": "'",
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "–": "--", "—": "--", "―": "--", "…": "...", "€": "$", "£": "#", "¢": "cents",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": "",
}  # fmt: skip
PLAIN = re.compile(r"[A-Za-z]+(?: [A-Za-z]+)* ?\.?\s*")


def ptb_tokenize(caption: str) -> list[str]:
    """Lower-cased PTB tokens of one caption, punctuation dropped; [] for a caption without a word."""
    return list(_tokenize(caption))


@lru_cache(maxsize=1 << 17)
def _tokenize(caption: str) -> tuple[str, ...]:
    return tuple(token for token in _scan(caption) if token and token not in PUNCTUATION)


def _scan(caption: str) -> list[str]:
    tokens: list[str] = []
    for match in TOKEN.finditer(caption):
        text = match.group().lower()
        if match.lastgroup == "whole":
            tokens.extend(SPLIT[text.replace("’", "'").replace("\x92", "'")])
        elif match.lastgroup == "dashes":
            tokens.append("--")
        elif match.lastgroup == "dots":
            tokens.append("...")
        else:
            if "’" in text or "\x92" in text:
                text = text.replace("’", "'").replace("\x92", "'")
            tokens.append(REWRITTEN.get(text, text))
    return tokens
