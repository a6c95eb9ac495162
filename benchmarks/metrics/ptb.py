"""Penn Treebank tokens as the COCO caption evaluation makes them, without Java.

pycocoevalcap runs Stanford CoreNLP 3.4.1's `PTBTokenizer -preserveLines -lowerCase` and drops some punctuation
tokens. This module was written from what that program is observed to do; each rule below answers something it
does. Equal on all 40,000 Flickr8k captions and on the hard strings of tests/benchmarks/test_metrics_ptb.py.

Known differences, none of which captions are likely to hold:
- telephone numbers with an area code in brackets, which it makes one token; unusual web and e-mail addresses;
- emoticons and abbreviations beyond those below; two quotation marks run together (“”);
- a typographic apostrophe within a word (B’scan), n't or 'n glued to what no English has (1@n't, more'n.);
- letters and signs newer than its Unicode tables, which it deletes;
- a line break within a caption is a space here, as \\n is there; any other line break shifts all its later lines.
"""

from __future__ import annotations

import re
from functools import lru_cache

# Dropped after tokenising. Brackets are listed in capitals, but lower-cased by then: "-lrb-" stays; so do "?!", "!!".
PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())

# Characters it deletes, which end a word as a space does: control and private use, rare signs, all beyond 16 bits.
DELETED = re.compile(
    "[\x7f-\x84\x86-\x90\x95\x98-\xa0\u2000-\u200f\u2012\u2024\u2025\u2027-\u202f\u203c\u203d\u2043\u2045-\u206f"
    "\u20a1-\u20a3\u20a5-\u20ab\u20ad-\u20ff\u2e00-\u3000\ue000-\uf8ff\ufdfc-\ufe6f\ufeff\ufffc-\U0010ffff]"
)

Q = "['’\x92]"  # apostrophe
# A letter (or a mark that belongs to one), and a letter or digit: \w but for signs such as ½, ² and ①, and "_".
SIGNS = "²³¹¼-¾⁰⁴-⁹₀-₉⅐-⅟①-⒛⓪-⓿❶-➓"
MARKS = "\u00ad\u0300-\u036f\u0900-\u0903\u093c-\u094e\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u2010\u2011"
L = rf"(?:[^\W\d_{SIGNS}]|(?=\W)[{MARKS}])"
A = rf"(?:[^\W_{SIGNS}]|(?=\W)[{MARKS}])"
PART = rf"{A}+(?:_{A}+)*"

# Abbreviations that keep their full stop: always, in capitals ("Wash." but "a wash."), and before a number.
ABBREVIATIONS = (
    "adj|adm|adv|al|ala|apr|ariz|assn|assoc|asst|atty|aug|ave|bhd|bldg|brig|blvd|bros|calif"
    "|capt|cf|cie|cmdr|co|col|colo|comdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|dr|drs"
    "|ens|esq|est|etc|ext|feb|fla|fri|ft|ga|gen|gov|govs|hon|inc|ind|insp|intl|jan|jos"
    "|jr|jul|jun|kan|ky|lt|ltd|maj|mar|md|messrs|mfg|mich|minn|mlle|mlles|mme|mmes|mo"
    "|mon|mont|mr|mrs|ms|msgr|mt|mtg|natl|neb|nev|nov|oct|okla|penn|pfc|ph|ph\\.d|plc"
    "|pres|prof|profs|pte|pty|pvt|rd|rep|reps|rev|rt|sen|sens|sep|sept|seq|sfc|sgt|spc"
    "|sq|sr|st|ste|supt|sys|tel|tenn|thu|thurs|treas|tue|tues|univ|va|vs|vt|wed|wis|wm"
    "|wyo"
)
CAPITAL = "ark|az|del|ill|la|mass|miss|ore|pa|tex|wash"
NUMBERED = "art|ca|figs?|nos?|op|pp|prop"
# Words made of two tokens, and where they part.
JOINED = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "lemme": 3, "gimme": 3, "'tis": 2, "'twas": 2, "more'n": 4}

TOKEN = re.compile(
    rf"""
    (?P<plain> (?!(?i:cannot|gonna|gotta|wanna|lemme|gimme)\b) [A-Za-z]+ (?=\s|$) )
  | (?P<markup> </?[A-Za-z!?][^<>]*> )
  | (?P<address> https?://[^\s"<>|()]*[^\s"<>|().,!?;:'\-]
      | {A}[\w.+%\-]*(?:@{A}[\w.\-]*)+(?<![.\-])
      | (?:{A}[\w\-]*\.)+(?:com|net|org|edu|gov)\b(?:/[^\s"<>|()]*[^\s"<>|().,!?;:'\-])?
      | (?:\#(?={L})|@(?={L}|_))\w+ )
  | (?P<entity> &(?:amp|lt|gt|quot|apos|nbsp);|&\#\d+; )
  | (?P<smile> :o\) | [:;=]-?[()DPpOo](?!\w) | \^_\^ | -_- | [cC]\+\+ | [cC]\#(?!\w) | (?:US|A|C)\$ )
  | (?P<quotes> ''|`` )
  | (?P<joined> (?i:cannot|gonna|gotta|wanna|lemme|gimme)(?![\w\-/]|[.!?]{L}|{Q}{L})
      | (?i:more'n)(?!\S) | '[Tt](?:is|was)(?!{L}(?<!n)) )
  | (?P<not> {L}+?(?<![Nn])(?=[Nn]{Q}[Tt]) | [Nn]{Q}[Tt](?!{A}) )
  | (?P<clitic> {Q}(?:[smdSMD]|re|ve|ll|RE|VE|LL)(?!{L}) )
  | (?P<short> {Q}n{Q} | {Q}(?:n|em|cause|til)(?!{A}) | (?<!{A}){Q}\d\ds?(?!{A}|{Q}s) )
  | (?P<elided> (?:{A}+-)*[dlonDLON]{Q}{L}+ | [Yy]{Q}(?={L})
      | (?i:ma{Q}am|{L}*[eo]{Q}er|c{Q}mon|s{Q}mores|cap{Q}n|li'l|ol{Q})(?!{A}) )
  | (?P<slashed> {A}+(?:-{A}+)*(?:/{A}+(?:-{A}+)*){{1,2}} )
  | (?P<hyphened> (?:{PART}|(?:[A-Za-z]\.)+)-(?:[A-Za-z]\.){{2,}}
      | {L}{A}*(?:\.{L}{A}*)*[.,]?(?:-{PART})+ )
  | (?P<initials> (?:[A-Za-z]\.)+(?:[A-Za-z](?![\w.]))?(?!{L}) )
  | (?P<abbreviation> (?:(?i:{ABBREVIATIONS})|(?=[A-Z])(?i:{CAPITAL}))\.(?!{L})
      | (?i:{NUMBERED})\.(?=\s*\d) | {L}{A}*\.(?=[,;]) )
  | (?P<company> [A-Z]+(?:&[A-Z]+)+ )
  | (?P<number> \d+[ ]\d{{1,4}}/\d{{1,4}}(?!\d)
      | \d+(?:[.,/]\d+)*(?:-(?:\d+/\d+|{PART}))+
      | [+\-]?(?:\d*+(?:[.,:]\d++)++|\d+(?!{A}|[-_]{A}|\.{A}+\.)) )
  | (?P<dotted> {L}{A}*(?:[.!?]{L}{A}*)+ | {A}+\.{A}+\.{A}+ )
  | (?P<word> {PART}(?:-{PART})* )
  | (?P<dots> \.\.\.+ )
  | (?P<run> [?!]+ | \*+ | _+ | --+ )
  | (?P<other> \S )
    """,
    re.VERBOSE,
)
REWRITTEN = {
    '"': "''", "“": "``", "”": "''", "«": "``", "»": "''", "‘": "`", "‛": "`", "‹": "`", "›": "'",
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "–": "--", "—": "--", "―": "--", "…": "...", "€": "$", "¤": "$", "₠": "$", "£": "#", "¢": "cents",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "’": "'", "‐": "", "‑": "", "\u00ad": "",
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": "",
}  # fmt: skip


def ptb_tokenize(caption: str) -> list[str]:
    """Lower-cased PTB tokens of one caption, punctuation dropped; [] for a caption without a word.

    A mixed fraction is one token with a no-break space in it ("1\\u00a01/2"), as it is there.
    """
    return list(_tokenize(caption))


@lru_cache(maxsize=1 << 17)
def _tokenize(caption: str) -> tuple[str, ...]:
    return tuple(token for token in _scan(caption) if token and token not in PUNCTUATION)


def _scan(caption: str) -> list[str]:
    tokens: list[str] = []
    for match in TOKEN.finditer(DELETED.sub(" ", caption.replace("&amp;", "&"))):
        kind, text = match.lastgroup, match.group().lower()
        if kind == "plain":
            tokens.append(text)
            continue
        if len(text) > 1 and not text.isascii():
            text = text.replace("\u00ad", "")
            if kind != "short":
                text = text.replace("’", "'").replace("\x92", "'")
        if kind == "joined":
            at = JOINED[text]
            tokens += (text[:at], text[at:])
        elif kind == "run":
            tokens.append("--" if text[0] == "-" else text)
        elif kind == "dots":
            tokens.append("...")
        elif kind == "smile":
            tokens.append(text.replace("(", "-lrb-").replace(")", "-rrb-"))
        elif kind == "markup" or kind == "number":
            tokens.append(text.replace(" ", "\xa0"))
        else:
            tokens.append(REWRITTEN.get(text, text))
    return tokens
