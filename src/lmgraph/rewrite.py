"""The rewrite guard: may this rewritten query take the original's place? Pure; it knows text, no model.

A rewrite may change the register of a query, never its content. What is looked at: numbers, quoted passages, formulas and
code, negation, language, emptiness, loops, being cut off. The guard says no rather than guess: the original is always right.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

NUMBER = re.compile(r"(?<![A-Za-z\d])\d+(?:[.,:]\d+)*")
QUOTED = re.compile(r"\"([^\"]{2,})\"|“([^“”]{2,})”|«([^«»]{2,})»|「([^「」]{2,})」|『([^『』]{2,})』|„([^„“”]{2,})[“”]")
_CJK = "\u3000-\u30ff\u3400-\u9fff\uac00-\ud7ff\uff00-\uffef"
_RUN = re.compile(rf"[^\s\"“”{_CJK}]*")
FORMULA = re.compile(r"\w[)\]}']*(?:[\^=≤≥<>+*/\\∑∫√≠→⊃∨∧≡±×÷]|(?<=[A-Za-z0-9])_(?=[A-Za-z0-9]))[\[({\-]*\w")
"""what makes a formula of the run of characters around it"""
PLACE = re.compile(r"\{(\d{1,2})\}")
"""where an earlier answer goes in the request of a step"""
CHEMICAL = re.compile(r"\b(?:[A-Z][a-z]?\d*){2,}\b")
_STRONG_EN = (
    r"\b(?:not|no|never|without|except|none|neither|nor|nothing|cannot|excluding)\b|n[o']t\b|n’t\b"
    r"|\b(?:dont|doesnt|didnt|cant|wont|isnt|arent|wasnt|hasnt|havent|shouldnt|wouldnt|couldnt)\b"
)
_WEAK_EN = (
    r"\b(?:un|in|im|ir|non|dis)[a-z]{3,}|\b(?:fail|lack|avoid|prevent|refus|den[iy]|reject|exclu)\w*"
    r"|\b(?:absen\w+|besides|beyond|only|other than|rather than|instead|another|otherwise|nobody|nonexist\w*|wrong|rarely|hardly|despite"
    r"|stop|break|breaks|too|negative|negat\w+|zero|yet|still|apart from|aside from|free of|against|oppos\w+|contrary|alone|impossib\w+|loses?|leaks?)\b"
)
"""words that may stand for a negation in a good rewrite: enough to excuse a lost or an added one"""
_IDIOMS_EN = re.compile(
    r"\b(?:do|does|did|can|could|would|should|is|was|has|have|wo|are)(?:n['’]?t| not)\s+(?:really |quite |even |fully |still )?"
    r"(?:get|got|understand|know|remember|want|need|see|find|figure|tell|follow|seem|think|recall|explain|believe|decide|it|they|you|we|i|he|she|that)\b"
    r"|\bcannot (?:find|remember|see|tell|figure|decide)\b|\bno (?:idea|clue|problem|worries|offen[cs]e|rush|matter)\b|\bnot (?:sure|just|only|really|exactly)\b|\bor not\b|\bwhy not\b"
    r"|\bif not\b|\bnot to mention\b|\bnever mind\b|\bi['’]?m not\b|\bno,|, not\b|, no\b|\bwithout (?:crying|boring|losing|going|looking|sounding|jargon|being)\b"
)
"""conversational negations of English that a rewrite may drop"""
_IDIOMS_ZH = re.compile(
    r"(.)[不没](?:有)?\1|有没有|不同|[不没](?:太|是很|怎么)?(?:听|看|搞|弄)?(?:懂|明白|清楚|理解|知道|会)|不过|不好意思|搞不|无(?:机|穷|限|线|氧|理数)|不等式|不[对确]定|"
    r"了[不没吗]|[吗呢]？?不|不(?:平衡|规则|动产|良|足|锈)|差不多|要不然?|对不对|不就|这不"
)
"""A-not-A questions, doubts and words that hold a sign of negation without negating"""
NEGATIONS = {
    "en": _STRONG_EN,
    "zh": r"[不没無无非未别勿莫]|除了|除外",
    "ja": r"ない|なか|なし|ません|ず|以外|不|非|無|ぬ",
    "ko": r"않|안 |없|못|아니|말고|제외",
    "es": r"\b(?:no|nunca|sin|ningun[oa]?|ningún|excepto|tampoco|nada|jamás|salvo)\b",
    "pt": r"\b(?:não|nao|nunca|sem|nenhuma?|exceto|nada|jamais|nem)\b",
    "fr": r"\b(?:ne|pas|jamais|sans|aucune?|sauf|ni|rien|non|hormis)\b|\bn['’]",
    "de": r"\b(?:nicht|nie|niemals|ohne|kein\w*|außer|ausser|nichts|weder|ausgenommen)\b",
    "it": r"\b(?:non|mai|senza|nessun\w*|tranne|eccetto|niente|né)\b",
    "nl": r"\b(?:niet|geen|nooit|zonder|behalve|niets)\b",
    "pl": r"\b(?:nie|nigdy|bez|żaden|żadn\w*|oprócz|ani)\b",
    "tr": r"\b(?:değil|yok|hiç|hiçbir|asla|olmadan|hariç)\b|m[ae]z\b|m[ae]d\w*|mıyor|miyor|muyor|müyor|m[ae]dan|m[ae]den|sız|siz\b",
    "ru": r"\b(?:не|нет|никогда|без|ни|кроме|нельзя|никак\w*|ничего)\b|\bне\w+",
    "ar": r"\b(?:لا|لم|لن|ليس|ليست|غير|بدون|دون|ما عدا|إلا)\b|عدم",
    "hi": r"नहीं|मत|बिना|कभी नहीं|\bन\b|के अलावा",
}
STOPWORDS = {
    "en": "the of and to is in that what how are for with does which explain why a my i you if can it this would should do we an at was",
    "es": "el la los las de que y en un una por para con del qué cómo es se",
    "fr": "le la les des du de et un une est que pour dans qui pourquoi comment l d",
    "de": "der die das und ist ein eine wie warum nicht mit von zu den im für auf",
    "pt": "o os as um uma de que e em para com do da por como é não",
    "it": "il lo la gli le di che e un una per con del della come è perché",
    "nl": "de het een en van is dat hoe waarom niet met voor op in te",
    "pl": "w i na z się nie jest do jak dlaczego co to czy od oraz",
    "tr": "ve bir bu nasıl neden ne için ile mi mı olarak açıklayın da de",
}
_STOP = {lang: frozenset(words.split()) for lang, words in STOPWORDS.items()}


def check(query: str, rewrite: str, finished: bool = True) -> str:
    """'' when the rewrite may be used, else why not (a short sentence)."""
    text = rewrite.strip()
    if not text:
        return "empty"
    if not finished:
        return "cut off"
    if loops(text):
        return "loops"
    if len(text) > 3 * len(query) + 120:
        return "much longer than the query"
    for complaint in (_numbers(query, text), _quotes(query, text), _formulas(query, text), _language(query, text), _negation(query, text)):
        if complaint:
            return complaint
    return ""


def check_part(query: str, request: str, finished: bool = True, earlier: int = 0) -> str:
    """The same for a request that is one step of several: it may leave out what other steps are asked, and may not add anything.

    `earlier`: how many steps are before it. Places for their answers (`{0}`) are no part of its text; a place for another one is no place.
    """
    text = PLACE.sub(" ", request).strip(" :,.;：，。")
    if not text:
        return "empty"
    if not finished:
        return "cut off"
    if loops(text):
        return "loops"
    if len(text) > 2 * len(query) + 120:
        return "much longer than the query"
    own = set(PLACE.findall(query))
    for place in PLACE.findall(request):
        if place in own:
            return f"{{{place}}} stands in the query itself"
        if int(place) >= earlier:
            return f"needs the answer of step {int(place) + 1}, which is not before it"
    if new := numbers(text) - numbers(query):
        return f"invented the number {min(new)}"
    return _invented_quote(query, text) or _language(query, text)


def loops(text: str) -> bool:
    """Whether a stretch of words (or, without blanks, of characters) comes three times in a row or far too often."""
    units = text.split()
    if len(units) < 4:
        units = list(text)
        size = 6
    else:
        size = 4
    grams = Counter(tuple(units[i : i + size]) for i in range(len(units) - size + 1))
    return bool(grams) and max(grams.values()) >= 3


def numbers(text: str) -> set[str]:
    """Numbers of a text in a common form: full-width digits folded, thousands separators dropped."""
    folded = text.translate(_DIGITS)
    return {re.sub(r"(?<=\d),(?=\d{3})", "", n) for n in NUMBER.findall(folded)}


_DIGITS = {0xFF10 + i: str(i) for i in range(10)}


def _numbers(query: str, text: str) -> str:
    before, after = numbers(query), numbers(text)
    if lost := before - after:
        return f"lost the number {min(lost)}"
    if new := after - before:
        return f"invented the number {min(new)}"
    return ""


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def _quotes(query: str, text: str) -> str:
    for match in QUOTED.finditer(query):
        passage = next(g for g in match.groups() if g)
        if _plain(passage) not in _plain(text):
            return f"lost the quotation {passage[:40]!r}"
    return _invented_quote(query, text)


def _invented_quote(query: str, text: str) -> str:
    known = _plain(query)
    for match in QUOTED.finditer(text):
        passage = next(g for g in match.groups() if g)
        if _plain(passage) not in known:
            return f"invented the quotation {passage[:40]!r}"
    return ""


def formulas(text: str) -> set[str]:
    """Formulas, code fragments and chemical formulas of a text, blanks left out."""
    found = {m.strip(".,;:!?()[]'’") for m in _formula_runs(text) if not re.fullmatch(r"[A-Za-z]+(?:/[A-Za-z]+)+.?|.*://.*", m)}
    return {_flat(f) for f in found if len(f) > 2} | {_flat(m) for m in CHEMICAL.findall(text) if re.search(r"\d", m)}


def _formula_runs(text: str) -> list[str]:
    # One regular expression would try every start of a long run without blanks: minutes for a pasted file.
    backwards = text[::-1]
    runs: list[str] = []
    end = 0
    for match in FORMULA.finditer(text):
        if match.start() >= end:
            left = _RUN.match(backwards, len(text) - match.start(), len(text) - end)
            right = _RUN.match(text, match.end())
            end = right.end() if right else match.end()
            runs.append(text[match.start() - (len(left.group()) if left else 0) : end])
    return runs


def _flat(text: str) -> str:
    return re.sub(r"\s", "", unicodedata.normalize("NFKC", text))


def _formulas(query: str, text: str) -> str:
    flat = _flat(text)
    lost = sorted(f for f in formulas(query) if f not in flat)
    return f"lost the formula {lost[0][:40]!r}" if lost else ""


def script(text: str) -> str:
    """The main script of a text: latin, han, kana, hangul, cyrillic, arabic, devanagari, other, or '' without letters."""
    count: Counter[str] = Counter()
    for char in text:
        if char.isalpha():
            name = unicodedata.name(char, "")
            for word, label in (
                ("CJK", "han"),
                ("HIRAGANA", "kana"),
                ("KATAKANA", "kana"),
                ("HANGUL", "hangul"),
                ("CYRILLIC", "cyrillic"),
                ("ARABIC", "arabic"),
                ("DEVANAGARI", "devanagari"),
                ("LATIN", "latin"),
            ):
                if word in name:
                    count[label] += 3 if label == "kana" else 2 if label == "han" else 1
                    break
            else:
                count["other"] += 1
    return count.most_common(1)[0][0] if count else ""


def language(text: str) -> str:
    """A guess at the language (two letters) from script and stop words; '' when unsure."""
    kind = script(text)
    if kind == "han":
        return "ja" if re.search(r"[\u3040-\u30ff]", text) else "zh"
    if kind != "latin":
        return {"kana": "ja", "hangul": "ko", "cyrillic": "ru", "arabic": "ar", "devanagari": "hi"}.get(kind, "")
    words = Counter(re.findall(r"[^\W\d_]+", text.casefold()))
    score = {lang: sum(words[w] for w in stop) for lang, stop in _STOP.items()}
    best = max(score, key=lambda lang: score[lang])
    runner = max(value for lang, value in score.items() if lang != best)
    return best if score[best] >= 2 * runner + 2 else ""


def _language(query: str, text: str) -> str:
    before, after = script(query), script(text)
    if before and after and before != after and {before, after} != {"han", "kana"}:
        return f"changed the script from {before} to {after}"
    one, two = language(query), language(text)
    if one and two and one != two and len(query.split()) >= 5:
        return f"changed the language from {one} to {two}"
    return ""


def negated(text: str, lang: str) -> bool:
    """Whether the text holds a word of negation or exclusion in this language."""
    plain = text.casefold()
    if lang == "en":
        plain = _IDIOMS_EN.sub(" ", plain)
    elif lang == "zh":
        plain = _IDIOMS_ZH.sub(" ", plain)
    return bool(re.search(NEGATIONS.get(lang, _STRONG_EN), plain))


def _negation(query: str, text: str) -> str:
    lang = language(query) or language(text) or "en"
    if lang == "en" and negated(query, lang) != negated(text, lang):
        silent = text if negated(query, lang) else query
        if re.search(_WEAK_EN, silent.casefold()) or re.search(_STRONG_EN, silent.casefold()):
            return ""
    before, after = negated(query, lang), negated(text, lang)
    if before and not after:
        return "lost a negation"
    if after and not before and lang == "en":
        return "added a negation"
    return ""
