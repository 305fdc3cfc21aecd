"""The rewrite guard: which rewrites may take the original's place, complaint by complaint and language by language."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmgraph import rewrite
from lmgraph.rewrite import check, check_part, formulas, language, loops, negated, numbers, script

GOOD = [
    ("What is 12 times 7?", "Calculate the product of 12 and 7."),
    ("how many people live in a city of 1,000 houses", "Estimate the population of a city with 1000 houses."),
    ("wie schnell ist ein auto das in 3 stunden 240 km fährt",
     "Berechnen Sie die Durchschnittsgeschwindigkeit eines Autos, das in 3 Stunden 240 km zurücklegt."),
    ("５加７等于多少？", "请计算5与7的和。"),
    ("who said \"I think therefore I am\" first", "Identify the author of the statement \"I think, therefore I am\"."),
    ("谁写了「静夜思」这首诗", "请说明「静夜思」的作者。"),
    ("que veut dire «carpe diem» au juste", "Expliquez le sens de l'expression « carpe diem »."),
    ("was heißt „carpe diem“ eigentlich genau", "Erläutern Sie die Bedeutung von „carpe diem“."),
    ("whats the derivative of x^3 at 2", "Determine the derivative of x^3 at x = 2."),
    ("求x^2+1的导数", "请计算 x^2 + 1 的导数。"),
    ("balance H2 + O2 -> H2O for me", "Balance the equation H2 + O2 -> H2O."),
    ("what does my_list[0] give", "State what the expression my_list[0] evaluates to."),
    ("which of these is not a prime number", "Identify which of the following is not a prime number."),
    ("what do i do if the pump doesn't start", "Describe the steps to take when the pump fails to start."),
    ("i don't get why the sky is blue", "Explain why the sky is blue."),
    ("no idea how vaccines work, can you explain", "Explain how vaccines work."),
    ("为什么鲸鱼不是鱼？", "请说明鲸鱼为何不属于鱼类。"),
    ("能不能解释一下光合作用？", "请解释光合作用的过程。"),
    ("warum ist der wal kein fisch und was ist er", "Erläutern Sie, warum der Wal nicht zu den Fischen gehört und was er ist."),
    ("pourquoi est-ce que la baleine n'est pas un poisson pour les savants",
     "Expliquez pourquoi la baleine n'est pas classée parmi les poissons par les savants."),
    ("por qué la ballena no es un pez", "Explique por qué la ballena no es un pez según la biología."),
    ("почему небо голубое", "Объясните, почему небо имеет голубой цвет."),
    ("東京の人口は？", "東京の人口を説明してください。"),
    ("광합성이 뭐야", "광합성의 과정을 설명하십시오."),
    ("ما هي الجاذبية", "اشرح مفهوم الجاذبية."),
]

BAD = [
    ("What is 12 times 7?", "Calculate the product of 12 and 8.", "lost the number 7"),
    ("What is 12 times 7?", "Calculate the product of 12 and seven.", "lost the number 7"),
    ("how old is the universe", "State the age of the universe, 13.8 billion years.", "invented the number 13.8"),
    ("wie schnell ist ein auto das in 3 stunden 240 km fährt",
     "Berechnen Sie die Geschwindigkeit eines Autos, das in 3 Stunden 24 km zurücklegt.", "lost the number 240"),
    ("combien font 5 fois 7 pour les enfants", "Calculez le produit de 5 et 9 pour les enfants.", "lost the number 7"),
    ("5加7等于多少？", "请计算5与8的和。", "lost the number 7"),
    ("加法是什么？", "请解释加法，例如3个苹果。", "invented the number 3"),
    ("who said \"I think therefore I am\" first", "Identify the author of the cogito.", "lost the quotation 'I think therefore I am'"),
    ("what does cogito ergo sum mean", "Explain the meaning of \"I think therefore I am\".", "invented the quotation"),
    ("谁写了「静夜思」这首诗", "请说明「春晓」的作者。", "lost the quotation '静夜思'"),
    ("que veut dire «carpe diem» au juste", "Expliquez le sens de l'expression «memento mori».", "lost the quotation 'carpe diem'"),
    ("wer darf hier parken und wie lange, außer den anwohnern",
     "Erläutern Sie, wer hier parken darf und wie lange, mit den Anwohnern.", "lost a negation"),
    ("was heißt „carpe diem“ eigentlich genau", "Erläutern Sie die Bedeutung dieser Wendung.", "lost the quotation 'carpe diem'"),
    ("what is the slope of x^n", "Determine the slope of x to the power n.", "lost the formula 'x^n'"),
    ("求x^n的导数", "请计算幂函数的导数。", "lost the formula 'x^n'"),
    ("where is H2O polar and why", "Explain the polarity of water.", "lost the formula 'H2O'"),
    ("why is user_name empty here", "Explain the reason for the empty user name.", "lost the formula 'user_name'"),
    ("what is a/b+c", "Compute a/b-c.", "lost the formula 'a/b+c'"),
    ("which of these is not a prime number", "Select the prime number from these options.", "lost a negation"),
    ("how does photosynthesis work without light", "Explain how photosynthesis works with light.", "lost a negation"),
    ("which bird can never fly", "Name the bird that can fly.", "lost a negation"),
    ("how does photosynthesis work with light", "Explain how photosynthesis works without light.", "added a negation"),
    ("which of these is a mammal", "Select the one that is not a mammal.", "added a negation"),
    ("为什么鲸鱼不是鱼？", "请说明鲸鱼为何属于鱼类。", "lost a negation"),
    ("除了水以外还有哪些溶剂？", "请列出常见的溶剂，包括水。", "lost a negation"),
    ("warum ist der wal kein fisch und was ist er", "Erläutern Sie, warum der Wal zu den Fischen gehört und was er ist.",
     "lost a negation"),
    ("wie kann ich das brot ohne hefe und mit mehl backen", "Erläutern Sie das Backen von Brot mit Hefe und Mehl.", "lost a negation"),
    ("pourquoi est-ce que la baleine n'est pas un poisson pour les savants",
     "Expliquez pourquoi la baleine est un poisson pour les savants.", "lost a negation"),
    ("por qué la ballena no es un pez", "Explique por qué la ballena es un pez.", "lost a negation"),
    ("почему кит не рыба", "Объясните, почему кит является рыбой.", "lost a negation"),
    ("why is the sky blue and not green in the evening",
     "Warum ist der Himmel blau und nicht grün am Abend, und wie ist das mit den Farben?", "changed the language from en to de"),
    ("warum ist der himmel am abend rot und nicht blau",
     "Explain why the sky is red and not blue in the evening, and what is the cause of it.", "changed the language from de to en"),
    ("why is the sky blue", "请说明天空为什么是蓝色的。", "changed the script from latin to han"),
    ("天空为什么是蓝色的？", "Explain why the sky is blue.", "changed the script from han to latin"),
    ("почему небо голубое", "Explain why the sky is blue.", "changed the script from cyrillic to latin"),
    ("광합성이 뭐야", "光合成とは何ですか。", "changed the script from hangul to"),
    ("what is gravity", "Explain gravity and mass and gravity and mass and gravity and mass and gravity.", "loops"),
    ("什么是引力？", "引力引力引力引力引力引力引力引力", "loops"),
    ("what is gravity", "", "empty"),
    ("what is gravity", " \n\t", "empty"),
    ("what is gravity", "Describe the historical development of the concept across many centuries, naming every contributor, "
                        "each experiment they made, how they disputed it, and the modern view of it.", "much longer than the query"),
]


@pytest.mark.parametrize(("query", "text"), GOOD)
def test_a_good_rewrite_may_be_used(query: str, text: str) -> None:
    assert check(query, text) == ""


@pytest.mark.parametrize(("query", "text", "complaint"), BAD)
def test_a_bad_rewrite_is_refused_with_the_reason(query: str, text: str, complaint: str) -> None:
    assert check(query, text).startswith(complaint)


@pytest.mark.parametrize("query", [query for query, *_ in GOOD + BAD] + [text for _, text in GOOD])
def test_an_ordinary_query_may_always_stay_as_it_is(query: str) -> None:
    assert check(query, query) == ""
    assert check(query, f"  {query}\n") == ""


@pytest.mark.parametrize("query", ["What is H２O made of?", "x² + y² = r²", "«a «b» c»", "\"\"", "f(x)=x", "＋１＝２", "ﬁ=ﬂ", "Ａ_b"])
def test_a_query_in_unusual_letters_may_stay_as_it_is(query: str) -> None:
    assert check(query, query) == ""


@pytest.mark.parametrize(("query", "text"), GOOD[:6])
def test_a_good_rewrite_that_was_cut_off_is_refused(query: str, text: str) -> None:
    assert check(query, text, finished=False) == "cut off"


def test_nothing_at_all_is_called_empty_even_when_it_was_cut_off() -> None:
    assert check("q", "", finished=False) == "empty"


ANYTHING = st.text(max_size=120) | st.text(alphabet="ab12 .,\"“”«»„'x^=+_/()不no", max_size=120)


@given(ANYTHING, ANYTHING, st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_two_texts_are_judged_without_an_error(query: str, text: str, finished: bool) -> None:
    assert isinstance(check(query, text, finished), str)
    assert not text.strip() or finished or check(query, text, finished) == "cut off"


ORDINARY = ["why", "is", "the", "sky", "blue", "not", "without", "12", "3.5", "x^3", "H2O", "\"so_be", "it\"", "la", "no", "pas", "ohne",
            "为什么", "不是", "天空", "кит", "не"]


@given(st.lists(st.sampled_from(ORDINARY), min_size=1, max_size=12, unique=True).map(" ".join))
@settings(max_examples=50, deadline=None)
def test_a_query_of_ordinary_words_may_stay_as_it_is(query: str) -> None:
    assert check(query, query) == ""


@pytest.mark.parametrize("text", [
    "x" * 20_000, "«a" * 10_000, "“" * 20_000, "„a" * 10_000, "=" * 20_000, "x=" * 10_000, "A" * 20_000 + "_", "1," * 10_000,
])
def test_a_long_text_without_blanks_is_judged_quickly(text: str) -> None:
    began = time.process_time()
    check(text, text[:-1] + "?")
    formulas(text)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(("text", "found"), [
    ("1,000 and 2.5", {"1000", "2.5"}), ("１２", {"12"}), ("H2O has no number, x3 neither", set()), ("at 10:30", {"10:30"}),
    ("1,000,000", {"1000000"}), ("第3章", {"3"}), ("", set()),
])
def test_numbers_are_read_in_one_form(text: str, found: set[str]) -> None:
    assert numbers(text) == found


@pytest.mark.parametrize(("text", "found"), [
    ("the derivative of x^3, please", {"x^3"}), ("求x^2+1的导数", {"x^2+1"}), ("(a+b)^2=c", {"a+b)^2=c"}), ("H2SO4 and NaCl", {"H2SO4"}),
    ("and/or", set()), ("see https://a.b/c?d=e", set()), ("snake_case", {"snake_case"}), ("a well-known fact", set()), ("", set()),
    ("x=1 and y=2", {"x=1", "y=2"}),
])
def test_formulas_are_found_and_ordinary_words_are_not(text: str, found: set[str]) -> None:
    assert formulas(text) == found


@pytest.mark.parametrize(("text", "kind"), [
    ("hello", "latin"), ("天空", "han"), ("ひらがな", "kana"), ("하늘", "hangul"), ("небо", "cyrillic"), ("سماء", "arabic"),
    ("आकाश", "devanagari"), ("ουρανός", "other"), ("12 + 5", ""), ("", ""), ("解释 HTTP 协议的作用", "han"),
])
def test_the_main_script_of_a_text_is_told(text: str, kind: str) -> None:
    assert script(text) == kind


@pytest.mark.parametrize(("text", "code"), [
    ("why is the sky blue and what is in it", "en"), ("why is the sky blue", ""),
    ("warum ist der himmel blau und wie weit", "de"), ("¿Por qué el cielo es azul y qué es la luz en la tierra?", "es"),
    ("为什么天空是蓝的", "zh"), ("東京の人口は", "ja"), ("하늘", "ko"), ("почему", "ru"), ("سماء", "ar"), ("आकाश", "hi"),
    ("ok", ""), ("12", ""), ("ουρανός", ""),
])
def test_a_language_is_named_only_where_it_is_plain(text: str, code: str) -> None:
    assert language(text) == code


@pytest.mark.parametrize(("lang", "denies", "affirms"), [
    ("en", "it is not a bird", "it is a bird"), ("en", "it isn’t blue", "it is blue"),
    ("en", "everything except water", "everything with water"),
    ("zh", "鲸鱼不是鱼", "鲸鱼是鱼"), ("zh", "没有水的行星", "差不多大的行星"), ("de", "kein Fisch", "ein Fisch"),
    ("de", "außer Wasser", "mit Wasser"),
    ("fr", "il n’est pas là", "il est là"), ("fr", "sans eau", "avec eau"), ("es", "no es azul", "es azul"), ("es", "sin agua", "con agua"),
    ("it", "senza acqua", "con acqua"), ("pt", "não é azul", "é azul"), ("nl", "geen vis", "een vis"), ("pl", "to nie ryba", "to ryba"),
    ("ru", "это не рыба", "это рыба"), ("ja", "魚ではない", "魚です"), ("ko", "물고기가 아니다", "물고기이다"),
    ("tr", "balık değil", "balık"),
])
def test_a_negation_is_heard_in_every_language(lang: str, denies: str, affirms: str) -> None:
    assert negated(denies, lang)
    assert not negated(affirms, lang)


@pytest.mark.parametrize("lang", sorted(rewrite.STOPWORDS))
def test_every_language_that_is_told_apart_has_words_of_negation(lang: str) -> None:
    assert lang in rewrite.NEGATIONS


@pytest.mark.parametrize(("text", "round_and_round"), [
    ("one two three four " * 3, True), ("one two three four " * 2, False), ("ab" * 20, True), ("abcdefghij", False),
    ("", False), ("a", False), ("to be or not to be", False),
])
def test_a_text_that_goes_round_is_called_a_loop(text: str, round_and_round: bool) -> None:
    assert loops(text) is round_and_round


# ---------------------------------------------------------------- requests that are one step of several


TASK = "A tank of 120 litres holds \"Brine No. 5\" of 3.5 % salt. How much salt is that, and may I pour it into the brook without a permit?"


@pytest.mark.parametrize(("request_", "earlier"), [
    ("Compute the salt in 120 litres at 3.5 %.", 0), ("May somebody pour {0} of salt into a brook?", 1), ("Join {0} and {1}.", 2), ("Explain {0}: {1}", 2),
    ("What is \"Brine No. 5\"?", 0), ("How much salt is that?", 0), ("Judge pouring {0}, without a permit", 1), (TASK, 0),
])
def test_a_request_for_a_part_may_leave_out_what_other_steps_are_asked(request_: str, earlier: int) -> None:
    assert check_part(TASK, request_, True, earlier) == ""


@pytest.mark.parametrize(("request_", "earlier", "complaint"), [
    ("", 0, "empty"), ("{0}", 1, "empty"), (" {0}: {1}. ", 2, "empty"), ("Compute the salt in 125 litres.", 0, "invented the number 125"),
    ("May one pour 4.2 kg of {0}?", 1, "invented the number 4.2"), ("What is \"Brine No. 7\"?", 0, "invented the number 7"), ("What is \"sea water\"?", 0, "invented the quotation 'sea water'"),
    ("Darf man das Salz in den Bach gießen und was ist mit dem Recht der Anlieger?", 0, "changed the language from en to de"), ("可以倒入小溪吗？", 0, "changed the script from latin to han"),
    ("salt and salt and salt and salt and salt and salt and salt", 0, "loops"), ("Tell me everything about it. " * 2 + "And of all " + "x y z " * 99, 0, "loops"),
    ("Explain {0}", 0, "needs the answer of step 1, which is not before it"), ("Explain {1} by {0}", 1, "needs the answer of step 2, which is not before it"),
    ("Explain {17}", 3, "needs the answer of step 18"),
])
def test_a_request_for_a_part_may_add_nothing_and_need_nothing_that_is_not_there(request_: str, earlier: int, complaint: str) -> None:
    assert check_part(TASK, request_, True, earlier).startswith(complaint)


def test_a_request_for_a_part_that_was_cut_off_or_is_far_too_long_is_refused() -> None:
    assert check_part("short?", "Explain the matter", finished=False) == "cut off"
    assert check_part("short?", " ".join(f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(60))) == "much longer than the query"


def test_places_of_the_users_own_text_cannot_be_told_from_those_of_answers() -> None:
    query = "what does '{0} and {1}'.format(a, b) give, and is it legal?"
    assert check_part(query, "What does '{0} and {1}'.format(a, b) give?", True, 2) == "{0} stands in the query itself"
    assert check_part(query, "Is {2} legal?", True, 3) == ""
    assert check_part(query, "Is that legal?", True, 0) == ""


@given(ANYTHING, ANYTHING | st.lists(st.sampled_from(["{0}", "{1}", "{9}", "word ", "7 ", '"a b"'])).map("".join), st.booleans(), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_any_request_for_a_part_is_judged_and_one_that_passes_needs_only_what_is_before_it(query: str, text: str, finished: bool, earlier: int) -> None:
    if check_part(query, text, finished, earlier) == "":
        assert finished and all(int(place) < earlier for place in rewrite.PLACE.findall(text)) and numbers(rewrite.PLACE.sub(" ", text)) <= numbers(query)
