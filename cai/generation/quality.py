"""Which revisions are none, and what can be cleaned off those that are. The patterns know English.

Cleaned: a `preamble` ("Sure, here is the revised response:", "Revision:"), a `postamble` ("This revised response
avoids ..."), `quotes` around the whole. Only what speaks of a completion or of revising is cut: "Here are three tips:",
"Here's how to bake bread:" and "Here is a message that you could send:" stay.
Dropped, each with the first reason of this list that holds: `empty`, `repetition`, `truncated` (cut off by the token
limit), `refusal` (of the task, with nothing else said), `parroted critique`, `unchanged`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rapidfuzz import fuzz


def _pattern(text: str) -> re.Pattern[str]:
    """Spaces and line breaks in `text` are for reading; a space to be matched is `_`, an apostrophe of any kind `'`."""
    return re.compile(re.sub(r"\s+", "", text).replace("_", r"\s").replace("'", "['’]"), re.IGNORECASE)


_ANSWER = r"(?:completion|response|answer|reply|revision)\b"
_REVISED = (
    rf"(?:revised|rewritten|reworded|rephrased|reworked)\b (?:[,_]+[\w-]+){{0,4}}? _(?:{_ANSWER}|(?:version|text|draft)\b)"
)
_BETTER = rf"""(?:new|better|improved|updated|corrected|modified|adjusted|alternative|safer|kinder|clearer|shorter|simpler|
    more_[\w-]+|less_[\w-]+)\b (?:[,_]+[\w-]+){{0,4}}? _{_ANSWER}"""
_NEW = rf"(?:{_REVISED}|{_BETTER}|(?:completion|revision|rewrite|response|reply)\b)"
"""What a revision is called. A bare "version", "message" or "answer" may well be what the person asked for."""
_WHICH = r"""
    (?:_(?:of|to)_(?:the|this|that|my|your)\b (?:_[\w\x27’-]+){0,3}?
        _(?:completion|response|answer|reply|question|request|prompt|critique|feedback)\b)?
    (?:[,_]_?(?:that|which|with|without|based|addressing|taking|avoiding|following|where|after|in|as|rewritten|revised)\b.{0,150})?
    (?:_?\([^)\n]*\))?"""
_OPENING = _pattern(r"(?:\([^)\n]{0,100}\)|[^\n:(]){1,250} (?::[*\x5f]*|(?=\n)|\Z)")
"""The first line, or what stands before the first colon in it."""
_ACKNOWLEDGES = _pattern(r"\W*(?:sure(?:_thing)?|certainly|of_course|okay|ok|absolutely|understood|got_it|alright)[!.,]+_+")
_ANNOUNCES = _pattern(rf"""
    \b(?:here(?:_is|'s|_are)|(?:below|this|following)_is)_(?:[\w\x27’-]+[,_]+){{0,4}}? {_NEW} {_WHICH} \W*\Z
    | \A\W*(?:(?:the|my|an?|one|possible)_)* (?:{_NEW}|revised|rewritten|assistant) (?:_\d+)? {_WHICH}
        (?:_(?:is|reads|(?:could|would|might)_be))? (?:_as_follows)? \W*\Z
    | \b(?:I(?:'ve|'d|'ll|_have|_would|_will)?|let_me)(?:_\w+)?_(?:revis|rewr|rephras|reword)\w+_(?:the|my|this|that)_
        (?:\w+_){{0,2}}{_ANSWER} .{{0,150}}\Z
    | \blet_me_(?:rephrase|revise|rewrite|reword)_(?:that|it)\W*\Z""")
_STARTS_OVER = _pattern(r"""(?m)
    ^[^\n:]{0,80} \b(?:revised|rewritten|reworded|rephrased|reworked)_(?:completion|response)\b [^\n:]{0,80}
    : [*\x5f]*[^\S\n]*$""")
"""A line of its own that announces the revision: what stands above it is talk."""
_FOR_THE_PERSON = _pattern(r"\b(?:here|below|this)\b .* \byou(?!r_(?:question|request|prompt|critique|feedback|concern))")
"""Announces something that the person can use: it belongs to the completion."""
_REWRITTEN = r"(?:revised|rewritten|reworded|rephrased|reworked)\b (?:[,_]+[\w-]+){0,4}?"
_TEXT = r"_(?:version|text|draft)\b (?!_(?:of|for)\b)"
_REMARKS = _pattern(rf"""\W*(?:note:?_+)? (?:
    (?:(?:in|with)_)?(?:this|the|my)_{_REWRITTEN} _{_ANSWER} | (?:this|my)_{_BETTER}
    | (?:in|with)_(?:this|the|my)_{_REWRITTEN} {_TEXT}
    | (?:this|the|my)_{_REWRITTEN} {_TEXT} (?:_\w+){{0,2}}?
        _(?:avoids|removes|omits|eliminates|replaces|acknowledges|emphasi[sz]es|focuses|aims|maintains|conveys|promotes|
            encourages|respects|softens|takes_(?:out|into)|leaves_out|no_longer|does(?:_not|n't)|is_(?:more|less))\b
    | I(?:'ve|_have)?_(?:revised|rewrote|rewritten|rephrased|removed|changed)\b (?!.*\byour\b) .{{0,80}} \b{_ANSWER})""")
_RULES = re.compile(r"\A[-*_]{3,}[ \t]*(?:\n|\Z)|\n[ \t]*[-*_]{3,}[ \t]*\Z")
_QUOTES = {'"': '"', "“": "”", "«": "»"}

_REFUSES = _pattern(r"""\b(?:
    (?:I|we)_(?:(?:really|simply|just|also)_)? (?:can(?:not|'?t|_not)|won'?t|will_not|do(?:n't|_not)_feel_comfortable)
    | (?:I(?:'m|_am)|we_are)_(?:sorry,_)? (?:unable|not_(?:able|going|comfortable|willing|programmed|allowed)) (?:_to)?
    | (?:I_)?(?:(?:must|have_to|need_to)_)?(?:respectfully_)? (?:decline|refuse|unable|not_able) (?:_to)?)
    (?:_(?:actually|really|directly|in_good_conscience))?
    (?=_help(?:_(?:you|with|in|to|that|this)\b|\W*\Z)
    | _(?:assist|provid|comply|fulfil|answer|generat|creat|writ|rewrit|revis|engag|support|discuss|giv(?!e_up)|shar|participat|
        continu|respond|encourag|condon|promot|offer|advis|produc|complet|process|tell_you_how|(?:do|say)_(?:that|this|so))
    | \W*\Z)""")
_SAYS_NOTHING = _pattern(r"""\W*(?:
    (?:no|(?:I(?:'m|_am)_)?(?:(?:so|very|really)_)?sorry)(?:_(?:about|for)_that)? \W*\Z
    | (?:I_apologi[sz]e|(?:my_)?apologies|thank_you_for_(?:your_)?understanding)\b
    | (?:as|I(?:'m|_am)_(?:(?:just|only)_)?)_?an?_(?:\w+_)?(?:AI|assistant|language_model)\b
    | I(?:'m|_am)_(?:programmed|designed|trained|here)_to\b | my_(?:purpose|goal|programming|guidelines|policy)\b
    | (?:it|this|that|they|doing_so|(?:such|this)_\w+)(?:'s)?(?:_\w+){0,4}
        _(?:illegal|unethical|harmful|inappropriate|wrong|offensive|dangerous|hurtful|disrespectful|against|violates?)\b
        (?:_\w+){0,4}\W*\Z
    | (?:(?:please|and)_)*
        (?:let_me_know|feel_free|(?:is|are)_there|do_you_have|can_I|how_(?:else_)?(?:can|may)_I|if_you|I(?:'m|_am|'d_be|_would_be|_can))
        .* \b(?:any_?thing|something|other|else|any_questions?|further|different)\b)""")
"""Apologies, what the model is, that it would be wrong, and offers of help with whatever else."""
_CLAUSE = _pattern(r"[,;:–—]?_*\b(?:but|however|instead|because|since|though|although|as)\b[,:]?_* | [;:–—]")
_BARE = 600
"""A refusal of more characters than this says something besides."""
_LEAD = 8
"""Words before "I can't" that may be but politeness."""
_ABOUT = _pattern(rf"""(?m)
    \A\W*the_(?:assistant'?s?_(?:\w+_)?|(?:last|previous|original|above)_){_ANSWER}
    | \A\W*the_completion_(?!of\b|dates?\b|rates?\b|times?\b) (?:
        (?:\w+_){{0,2}}? (?:insult|threat|encourag|promot|suggest|impl(?:y|ies)\b|assum|fail|lack|contain|endors|normali|
            trivial|justif|discriminat|mock|accus|advocat|incit|glorif|condon|perpetuat|generali|respond|acknowledg)
        | [^\n]{{0,200}}? \b(?:users?|human|reader|assistant|critique|offensive|harmful|toxic|unethical|illegal|racis\w+
            |sexis\w+|stereotyp\w+|biased|rude|insulting|hurtful|disrespectful|inappropriate|dangerous|misleading|violen\w+)\b)
    | ^[^\w\n]{{0,8}}(?:please_)?(?:rewrite|revise|write)_the_(?:[\w\x27’]+_){{0,2}}completion\b""")
"""A text about the completion, or the request for a revision said again."""
_PARROT = 85
"""Similarity (of 100) between a revision and its critique from which the one is a copy of the other."""
_IGNORED = re.compile(r"[\s.,;:!?'\"‘’“”*_#`]+")


class Cleaned(NamedTuple):
    """A revision's text, and what was cleaned off it."""

    text: str
    cleaned: tuple[str, ...]


def clean_revision(text: str) -> Cleaned:
    """The text without what is not part of the revised completion; empty where nothing is."""
    cleaned = []
    text = text.strip()
    for name, clean in (("preamble", _without_preamble), ("postamble", _without_postamble), ("quotes", _without_quotes)):
        rest = clean(text)
        if rest != text:
            text = rest
            cleaned.append(name)
    return Cleaned(text, tuple(cleaned))


def _without_preamble(text: str) -> str:
    for _ in range(2):  # "Sure, here is the revised response:\n\nRevised response: ..."
        acknowledged = _ACKNOWLEDGES.match(text)
        opening = _OPENING.match(text, acknowledged.end() if acknowledged else 0)
        if not opening or not _ANNOUNCES.search(opening[0]) or _FOR_THE_PERSON.search(opening[0]):
            break
        text = _RULES.sub("", text[opening.end() :].strip()).strip()
    talk = _STARTS_OVER.search(text)
    return text[talk.end() :].strip() if talk else text


def _without_postamble(text: str) -> str:
    head, _, last = text.rpartition("\n\n")
    return _RULES.sub("", head.strip()).strip() if "\n" not in last and _REMARKS.match(last) else text


def _without_quotes(text: str) -> str:
    inner = text[1:-1]
    quoted = len(text) > 2 and _QUOTES.get(text[0]) == text[-1] and text[0] not in inner and text[-1] not in inner
    return inner.strip() if quoted else text


def find_problem(text: str, before: str, critique: str, truncated: bool) -> str | None:
    """Why `text` is no revision of `before`, or None. `critique` is what the revision was to heed."""
    if not text.strip():
        return "empty"
    if loops(text):
        return "repetition"
    if truncated:
        return "truncated"
    if refuses_bare(text):
        return "refusal"
    if _parrots(text, critique):
        return "parroted critique"
    return "unchanged" if plain(text) == plain(before) else None


def loops(text: str) -> bool:
    """Whether a text goes round in circles: ends in the same stretch over and over, or repeats most of what it says."""
    return _ends_in_loop(text.rstrip()) or _says_again(text)


def _ends_in_loop(text: str) -> bool:
    """The end is one stretch of up to 200 characters at least 4 times over, and the more often the shorter it is."""
    for size in range(1, min(200, len(text) // 4) + 1):
        unit = text[-size:]
        if text.endswith(unit * 4):
            length = 50 if re.search(r"[^\s\d\-=_.*#~+|]", unit) else 400  # a line to sign on or a googol is no loop
            if text.endswith(unit * max(4, -(-length // size))):
                return True
    return False


def _says_again(text: str) -> bool:
    """Less than 0.4 of all runs of four words are new. Tables of numbers have too few words to tell."""
    words = re.findall(r"[^\W\d_]+", text.casefold())
    if len(words) < 40 or sum(map(len, words)) < len(text) / 2:
        return False
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return len(set(runs)) < 0.4 * len(runs)


def refuses_bare(text: str) -> bool:
    """Whether a text refuses and says nothing else: no reason that helps, no other way, no question."""
    if len(text) > _BARE or not _REFUSES.search(text):
        return False
    sentences = re.split(r"(?<=[.!?])\s+|\n+", text.strip())
    return all(_is_bare(sentence) for sentence in sentences if re.search(r"\w", sentence))


def _is_bare(sentence: str) -> bool:
    clauses = [sentence]
    if refusal := _REFUSES.search(sentence):
        before, after = sentence[: refusal.start()], sentence[refusal.end() :]
        clauses = [before] if len(before.split()) > _LEAD else []
        clauses += _CLAUSE.split(after)[1:]
    return all(_SAYS_NOTHING.match(clause) for clause in clauses if re.search(r"\w", clause))


def _parrots(text: str, critique: str) -> bool:
    """The critique said again, alone or with more around it, or a text that is about the completion instead of being one."""
    said, criticised = plain(text), plain(critique)
    copied = len(criticised) >= 20 and fuzz.ratio(said, criticised, score_cutoff=_PARROT) > 0
    return copied or (len(criticised) >= 60 and criticised in said) or bool(_ABOUT.search(text))


def plain(text: str) -> str:
    """Without what does not make two texts differ: case, spaces, punctuation, Markdown's marks."""
    return _IGNORED.sub(" ", text.casefold()).strip()
