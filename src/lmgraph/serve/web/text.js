// Text as it is shown: an answer's blocks, and what differs between a query and its rewriting. Pure; no DOM.

/** Paragraphs and fenced code blocks of an answer: [{code: bool, text}]. An open fence (a stream) is a code block already. */
export function blocks(text) {
  const out = [];
  let lines = [];
  let fence = "";
  const close = (code) => {
    if (code) out.push({ code, text: lines.join("\n") });
    else for (const part of lines.join("\n").split(/\n\s*\n/)) if (part.trim()) out.push({ code, text: part.replace(/^\n+|\s+$/g, "") });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const mark = /^\s*(`{3,}|~{3,})/.exec(line)?.[1];
    if (!fence && mark) {
      close(false);
      fence = mark;
    } else if (fence && mark?.startsWith(fence) && line.trim() === mark) {
      close(true);
      fence = "";
    } else lines.push(line);
  }
  if (fence || lines.length) close(Boolean(fence));
  return out;
}

function words(text) {
  if (Intl.Segmenter) return Array.from(new Intl.Segmenter(undefined, { granularity: "word" }).segment(text), (piece) => piece.segment);
  return text.match(/\w+|\s+|[^\w\s]/gu) ?? [];
}

const LONGEST = 600; // words; the comparison takes the square of it

/**
 * What differs between two texts, word by word (longest common subsequence): {before, after}, each a list of {text, changed}.
 * Long texts are not compared: each is one piece, changed when they differ at all.
 */
export function difference(before, after) {
  const a = words(before);
  const b = words(after);
  if (before === after || a.length > LONGEST || b.length > LONGEST) {
    const changed = before !== after;
    return { before: [{ text: before, changed }], after: [{ text: after, changed }] };
  }
  const same = (i, j) => a[i].toLowerCase() === b[j].toLowerCase();
  const lengths = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      lengths[i][j] = same(i, j) ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
  const left = [];
  const right = [];
  for (let i = 0, j = 0; i < a.length || j < b.length;) {
    if (i < a.length && j < b.length && same(i, j)) {
      put(left, a[i++], false);
      put(right, b[j++], false);
    } else if (j >= b.length || (i < a.length && lengths[i + 1][j] >= lengths[i][j + 1])) put(left, a[i++], true);
    else put(right, b[j++], true);
  }
  return { before: left, after: right };
}

function put(pieces, text, changed) {
  const last = pieces.at(-1);
  if (last && last.changed === changed) last.text += text;
  else pieces.push({ text, changed });
}
