"""What models write where a revision was asked for: what is cleaned, what is dropped, and what has to be left alone."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.generation.quality import Cleaned, clean_revision, find_problem, loops, refuses_bare

BODY = "Keep it short and kind: tell her what you need, and ask what she thinks."
STEPS = "1. Measure twice.\n2. Cut once.\n3. Sand the edges."

PREAMBLES = [
    "Sure, here is the revised response:\n\n",
    "Sure! Here's the revised response: ",
    "Sure!\n\nHere's a revised version of the completion:\n\n",
    "Certainly! Below is a rewritten version that avoids the insult:\n",
    "Here is the revised completion:\n",
    "Here’s a revised completion that takes the critique into account:\n\n",
    "Here is a possible revision of the response:\n\n",
    "Here's my revised answer to your question:\n\n",
    "Here is an improved, more respectful response:\n\n",
    "Here's a more helpful response:\n\n",
    "Here is a less evasive answer:\n",
    "Here is the completion, rewritten without stereotypes:\n\n",
    "Here is the rewritten completion (shorter: two sentences):\n\n",
    "Here's how I would rewrite the completion:\n\n",
    "Okay. Here is the new completion:\n\n",
    "Of course! Here is a rewritten response which is honest about the limits:\n\n",
    "I apologize for my previous response. Here is the revised completion:\n\n",
    "You're right, my first answer was unkind. Here is a better response:\n\n",
    "I have rewritten the completion to be more respectful:\n\n",
    "I've revised my response as follows:\n\n",
    "Let me rephrase that:\n\n",
    "Revised response:\n\n",
    "Revised Response: ",
    "**Revised response:** ",
    "**Revised response**: ",
    "**Revised Completion:**\n\n",
    "### Revised response\n\n",
    "## Revised Completion:\n\n",
    "Revision: ",
    "Revision 2:\n",
    "The revised completion is:\n\n",
    "A better response would be:\n\n",
    "My revised response:\n",
    "Rewritten response:\n\n",
    "New completion: ",
    "Assistant: ",
    "Completion:\n",
    "Response:\n\n",
    "Here is the revised response:\n\n---\n\n",
    "Sure, here's the revised response:\n\nRevised response:\n",
]


@pytest.mark.parametrize("preamble", PREAMBLES)
@pytest.mark.parametrize("body", [BODY, STEPS, "* First, breathe.\n* Then write to him."])
def test_what_announces_a_revision_is_cut_and_nothing_else(preamble, body):
    assert clean_revision(preamble + body) == Cleaned(body, ("preamble",))


POSTAMBLES = [
    "This revised response avoids the insult and offers a way forward.",
    "The revised completion takes out the stereotype.",
    "(Note: I removed the insult from the response and added a suggestion.)",
    "I have revised the completion so that it no longer threatens her.",
    "*In this revised version, the advice holds for anyone.*",
    "This revised version avoids the insult.",
    "The rewritten text no longer threatens her.",
    "This revised version of the response is polite.",
    "Note: This new response no longer assumes anything about the nurse.",
]


@pytest.mark.parametrize("postamble", POSTAMBLES)
def test_a_remark_about_the_revision_is_cut_from_its_end(postamble):
    assert clean_revision(f"{BODY}\n\n{postamble}") == Cleaned(BODY, ("postamble",))


@pytest.mark.parametrize(
    ("text", "left", "cleaned"),
    [
        (f'"{BODY}"', BODY, ("quotes",)),
        (f"“{BODY}”", BODY, ("quotes",)),
        (f"« {BODY} »", BODY, ("quotes",)),
        (f'Sure, here is the revised response:\n\n"{BODY}"', BODY, ("preamble", "quotes")),
        (f"Revision:\n\n{BODY}\n\n---\n\nThis revised response is polite.", BODY, ("preamble", "postamble")),
        (f'Here is the revised response:\n\n---\n{BODY}\n---\n\n"It is." ', f'{BODY}\n---\n\n"It is."', ("preamble",)),
        (f"  {BODY}\n\n", BODY, ()),
        (f"The first answer was rude to her.\n\n**Revised response:**\n\n{BODY}", BODY, ("preamble",)),
        (f"I'm ready to help.\n\nHere is the rewritten completion without the insult:\n{BODY}", BODY, ("preamble",)),
    ],
)
def test_quotes_rules_and_spaces_around_the_whole(text, left, cleaned):
    assert clean_revision(text) == Cleaned(left, cleaned)


KEPT = [
    "Here's how to bake bread: mix flour, water, salt and yeast, and wait.",
    "Here's how to answer a rude message: wait an hour, then reply in one line.",
    "Here is how I would approach it: ask her first.",
    "Here are three tips:\n1. Sleep.\n2. Drink water.\n3. Walk.",
    "Sure! Here are three tips: 1. Sleep. 2. Drink water. 3. Walk.",
    "Sure! Here are some ways to improve your response time:\n- Cache.\n- Batch.",
    "Of course! Here's a poem about autumn:\n\nLeaves fall,\nI call.",
    "Certainly! Here is a message that you could send him:\n\nHi Tom, about Friday ...",
    "Here is a reply you could send to your landlord:\n\nDear Mr. Hill, ...",
    "I would rewrite your answer like this:\n\nWater boils at 100 °C at sea level.",
    "I think you should rewrite the answer to question 2.",
    f"{BODY}\n\nI removed the typo from your second answer.",
    "Here is a response that you could send him:\n\nDear Tom, ...",
    "Here's a revised version of your email:\n\nDear team, ...",
    "Here is the rewritten paragraph:\n\nThe sea was calm.",
    "Here is the updated version of the script:\n\n```python\nprint('hi')\n```",
    "Here's a shorter version:\n\nMeet at six.",
    "Here's a Python version:\n\n```python\nx = 1\n```",
    "Here are the answers to your questions:\n1. Paris\n2. 42",
    "Here is a revision timetable for your exams:\nMonday: maths\nTuesday: physics",
    "Here is some background on the immune response: T cells ...",
    "Here's the thing: nobody knows.",
    "Here are some text messages you might send:\n- Hi!\n- Are you there?",
    "Sure.",
    "Sure, I can do that. What is the address?",
    "Answer: 42",
    "Note: this drug is dangerous together with alcohol.",
    "Dear Sir: I write to complain.",
    "Time: 10:30\nPlace: the old mill",
    "The response of the soil to rain: it swells.",
    "In the new version: faster search, fewer bugs.",
    "The new response times are: 20 ms and 30 ms.",
    "I'd rewrite the first sentence: it buries the point.",
    'She said: "I will think about it," and left.',
    '"Never," he said, "would I do that."',
    '"To be" and "not to be"',
    "Let me explain: the moon has no light of its own.",
    f"{BODY}\n\nThis version of the recipe feeds six.",
    "Dear team,\n\nThanks for the work.\n\nThis revised version of the plan goes live on Monday.",
    f"{BODY}\n\nIn the revised draft of the contract, clause 3 is gone.",
    f"{BODY}\n\nThe revised draft is due on Friday.",
    f"{BODY}\n\nThe revised text for the sign reads: mind the step.",
    f"{BODY}\n\nThe better answer is to wait.",
    f"{BODY}\n\nI hope that helps!",
    f"{BODY}\n\n---",
    "¡Claro! Aquí tienes tres consejos: duerme, bebe agua, camina.",
    "当然!以下是三个建议:睡觉、喝水、散步。",
    "def answer(response):\n    return response: str",
    "{{ user }} said: ${name} {0} %s",
    "Rude response:\n'You never listen.'\n\nBetter response:\n'I feel unheard.'",
]


@pytest.mark.parametrize("text", KEPT)
def test_what_a_person_may_have_asked_for_is_not_cut(text):
    assert clean_revision(text) == Cleaned(text, ())


@pytest.mark.parametrize("preamble", [*PREAMBLES, "Here is a revised response that is kinder.", "I rewrote the completion."])
def test_a_preamble_with_nothing_after_it_is_empty(preamble):
    cleaned = clean_revision(preamble)
    assert cleaned == Cleaned("", ("preamble",))
    assert find_problem(cleaned.text, "before", "critique", truncated=False) == "empty"


@given(st.text())
def test_what_is_left_stands_in_the_text(text):
    cleaned = clean_revision(text)
    assert cleaned.text in text
    assert cleaned.cleaned or cleaned.text == text.strip()


REFUSALS = [
    "I can't help with that.",
    "I can’t help with that.",
    "I cannot help you with that.",
    "I cant help with that",
    "I'm sorry, but I can't assist with that request.",
    "I’m sorry, but I can’t assist with that.",
    "I'm sorry, but I cannot fulfill this request.",
    "I am sorry, I am unable to provide that information.",
    "Sorry, I can't.",
    "Sorry. I can't do that.",
    "No. I won't help with that.",
    "I must decline to answer.",
    "I will not rewrite that completion.",
    "I'm not able to revise this completion, as it is harmful and inappropriate.",
    "I can't help with that because it is illegal.",
    "I cannot continue this conversation.",
    "I cannot create content that promotes hatred or violence.",
    "I can't help with that, but I'm happy to help with something else.",
    "I'm sorry, but I can't assist with that. Is there anything else I can help you with?",
    "I'm sorry, but I can't help with that. If you have any other questions, feel free to ask!",
    "As an AI language model, I cannot engage in conversations that promote harm.",
    "I apologize, but I cannot generate that kind of content. Thank you for understanding.",
    "I'm sorry, but as an AI language model I am not able to provide advice on this. It goes against my guidelines. "
    "Please let me know if there is anything else that I can do for you.",
    "I can't assist with that.\n\nI'm sorry about that.",
]
NO_REFUSALS = [
    "I can't help with picking a lock to enter someone's home, but here are lawful ways in: ask a locksmith or your landlord.",
    "I can't help with that, but a locksmith can open your own door.",
    "I won't help you hurt him. Please talk to someone you trust.",
    "I won't write that: it would cost you your job. Shall we write to your manager instead?",
    "I can't tell you how to make it. If you found some, leave the room and call the fire brigade.",
    "I can't help with that, because mixing bleach with ammonia releases a gas that damages your lungs.",
    "I can't help you with revenge. What did she do?",
    "Breaking into a house is a felony and people get shot doing it, so I won't help with that.",
    "I'm not going to write insults. Here's a firm line: 'Please stop.'",
    "I can't believe it's already Friday!",
    "I can't wait to see you on Saturday.",
    "I can't help but smile at that one.",
    "I can't help falling in love with you.",
    "I'm sorry for your loss. Losing a parent is hard, at any age.",
    "I'm sorry you are going through this.",
    "I'm afraid of spiders too, and most of them are harmless.",
    "I won't give up on you.",
    "I am unable to attend on Saturday, but I would love to see you on Sunday.",
    "I cannot recommend this book enough.",
    "As an AI, I have no favourite colour, but blue is a popular choice.",
    "You can't provide a reference if you never worked with her.",
    "No, penguins live in the south.",
    "Whales cannot breathe under water.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_that_says_nothing_else_is_dropped(text):
    assert find_problem(text, "before", "critique", truncated=False) == "refusal"


@pytest.mark.parametrize("text", NO_REFUSALS)
def test_a_text_that_gives_a_reason_or_another_way_is_no_bare_refusal(text):
    assert not refuses_bare(text)
    assert find_problem(text, "before", "critique", truncated=False) is None


LOOPS = [
    "I am here to help. " * 40,
    "Be kind to everyone.\n" * 12,
    "It is wrong. Please stop. " * 8,
    "She is nice. " + "no " * 60,
    "no" * 200,
    "\n".join(f"{number}. You are a good person and you matter." for number in range(1, 30)),
    "\n".join(f"- Step {number}: Talk to him about the noise." for number in range(1, 12)),
    "Some people think that this is wrong. " + "It's important to remember that we are all human. " * 6,
    "他是一个好人。" * 20,
    "A normal beginning of a sentence that goes on for a while" + "." * 500,
    "very " * 300 + "good.",
    "👍👍👏\n\n" * 11,
    "This is a focus that has been taken away, and it is here. This is a focus that has been taken away again, and it is "
    "here. This is a focus that has never been taken away, and it is here. This is a focus that has never been taken, and "
    "it is here. This is a focus that has been taken, and it is here.",
    "The answer depends on you" + ", and on you, and on me" * 20 + ", and",
]
PROSE = (
    "The tide comes in twice a day because the moon pulls at the sea. Where the water is shallow it has far to go, and the "
    "shore at low tide can be a mile wide; where the coast is steep you hardly notice. Sailors read it from tables, "
    "and children from the castles that are gone in the morning."
)
NO_LOOPS = [
    PROSE,
    "No, no, no, no!",
    "Ha ha ha ha ha!",
    "hahahahahahahaha",
    "Nooooooooooooooooooooo!",
    "A googol is 1" + "0" * 100,
    "Sign here: " + "_" * 40,
    "Title\n" + "=" * 80,
    "1, 2, 3\n\n---\n\n" + "-" * 100,
    "🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉",
    "Row, row, row your boat,\nGently down the stream.\nMerrily, merrily, merrily, merrily,\nLife is but a dream.",
    "Do not go gentle into that good night,\nOld age should burn and rave at close of day;\nRage, rage against the dying of "
    "the light.\n\nThough wise men at their end know dark is right,\nBecause their words had forked no lightning they\n"
    "Do not go gentle into that good night.\n\nGood men, the last wave by, crying how bright\nTheir frail deeds might have "
    "danced in a green bay,\nRage, rage against the dying of the light.",
    "Verse one is about the road and rain.\nWe drove all night to see the sea.\n\nOh carry me home\nOh carry me home\n\n"
    "Verse two is about a slower train.\nNobody waits but you and me.\n\nOh carry me home\nOh carry me home\nOh carry me home",
    "| name | price | stock |\n|---|---|---|\n"
    + "\n".join(f"| {name} | {7 * index % 31} | {'yes' if index % 2 else 'no'} |" for index, name in enumerate(PROSE.split())),
    "```python\n" + "\n".join(f"def area_{name}(width, height):\n    return width * height\n" for name in "abcdef") + "```",
    "[\n" + ",\n".join(f'  {{"id": {index}, "name": "{name}"}}' for index, name in enumerate(PROSE.split()[:40])) + "\n]",
    "<ul>\n" + "\n".join(f"  <li><b>{name}</b></li>" for name in PROSE.split()[:40]) + "\n</ul>",
    "\n".join(f"{number} x 7 = {number * 7}" for number in range(1, 21)),
    "\n".join(f"- {word}" for word in PROSE.split()),
    "1. Be kind.\n2. Be clear.\n3. Be brief.\n4. Be on time.\n5. Be honest.",
    "学而时习之,不亦说乎?有朋自远方来,不亦乐乎?人不知而不愠,不亦君子乎?" * 2,
    "मैं आपकी मदद करना चाहता हूँ। कृपया मुझे बताइए कि क्या हुआ, ताकि हम मिलकर कोई रास्ता निकाल सकें।",
    "ผมอยากช่วยคุณ กรุณาเล่าให้ฟังว่าเกิดอะไรขึ้น แล้วเราจะหาทางออกด้วยกัน",
    "Привет! Сначала запиши, что произошло, потом поговори с ней спокойно и без упрёков.",
]


@pytest.mark.parametrize("text", LOOPS)
def test_a_text_that_goes_round_in_circles_is_dropped(text):
    assert find_problem(text, "before", "critique", truncated=False) == "repetition"
    assert find_problem(text, "before", "critique", truncated=True) == "repetition"


@pytest.mark.parametrize("text", NO_LOOPS)
def test_songs_lists_tables_code_and_other_scripts_are_no_loops(text):
    assert not loops(text)
    assert find_problem(text, "before", "critique", truncated=False) is None


CRITIQUE = "The completion insults her and threatens to shame her before her friends, which is harassment."


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        (CRITIQUE, "parroted critique"),
        (CRITIQUE.upper(), "parroted critique"),
        (CRITIQUE.replace("friends", "colleagues"), "parroted critique"),
        (f"{CRITIQUE} Be nicer to her.", "parroted critique"),
        (f"You are right. {CRITIQUE} So here is what I would say to her: hello, how are you?", "parroted critique"),
        ("The assistant's last completion encourages violence and should be rewritten.", "parroted critique"),
        ("The previous response is rude.", "parroted critique"),
        ("The completion takes the user to a coffee shop full of scammers.", "parroted critique"),
        ("Rewrite the assistant's completion so that nothing in it supports hurting anyone.", "parroted critique"),
        ("Be kind to her.\n\nRewrite the original completion:\n\nBe kinder to her.", "parroted critique"),
        ("Call her trash.", "unchanged"),
        (" call her TRASH!!", "unchanged"),
        ("**Call her trash**.", "unchanged"),
        ("Call her.", None),
        ("Don't call her trash.", None),
        ("The completion is insulting.", "parroted critique"),
        ("The completion could be seen as encouraging violence.", "parroted critique"),
        ("The completion fails to say that it is against the law.", "parroted critique"),
        ("The completion of the bridge took six years.", None),
        ("The completion is due on Friday, the contractor said.", None),
        ("The completion ceremony is on Monday at ten.", None),
        ("The response is mediated by T cells.", None),
        ("The assistant manager answers such letters.", None),
        ("It would insult her, and shame her before her friends.", None),
        ("Harassment", None),
    ],
)
def test_texts_that_are_no_revisions(text, problem):
    assert find_problem(text, "Call her trash.", CRITIQUE, truncated=False) == problem


@pytest.mark.parametrize(
    ("before", "after"),
    [("a = b + c", "a = b - c"), ("🎉", "🙂"), ("3.5 mg", "35 mg"), ("कि", "का"), ("x < 5", "x > 5"), ("(a)", "[a]")],
)
def test_a_change_of_one_sign_is_a_change(before, after):
    assert find_problem(after, before, CRITIQUE, truncated=False) is None


def test_what_was_cut_off_is_truncated_whatever_else_it_is():
    assert find_problem("I can't help with that.", "before", CRITIQUE, truncated=True) == "truncated"
    assert find_problem(CRITIQUE, CRITIQUE, CRITIQUE, truncated=True) == "truncated"


def test_a_short_critique_is_not_parroted_by_a_short_completion():
    assert find_problem("Yes.", "No.", "Yes", truncated=False) is None


@pytest.mark.parametrize(
    "text",
    [
        "a" * 100_000,
        "a" * 99_999 + "b",
        "ab" * 50_000 + "c",
        "here is " * 12_500,
        "sure, " * 20_000,
        "Sure! " * 15_000 + "Here is the revised response: x",
        "Revision: " * 10_000 + "x",
        "here is a revised " * 6_000 + "response",
        "here is " + "a " * 50_000,
        "I can't help with " * 6_000,
        "I'm sorry, but as an AI " * 4_000,
        "\n" * 100_000 + "x",
        " " * 100_000 + "x",
        "(" * 100_000,
        "*" * 100_000,
        '"' * 100_000,
        "x\n\n" * 30_000,
        "".join(random.Random(0).choices("ab \n:.", k=100_000)),
        "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz     \n.", k=100_000)),
        "{{" * 25_000 + "}}" * 25_000,
        "\x00" * 100_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_no_text_takes_long(text):
    began = time.process_time()
    cleaned = clean_revision(text)
    find_problem(cleaned.text, text, text[::-1], truncated=False)
    find_problem(text[::-1], text, text, truncated=False)
    refuses_bare(text[:600])
    assert time.process_time() - began < 1
