// Text token by token: coloured by its bits, or by the bits that a part saves; a card for each says what else could be.
import { byId, element, number } from "./dom.js";

/** Bits from which on a token has the colour of a level. */
const LEVELS = [0.5, 1.5, 3, 5, 8, 12];
/** Bits saved or cost from which on a token has a colour of the difference. */
const CHANGES = [0.1, 0.3, 1, 2, 4];

/** Return the class of a token's colour. */
export function shade(token) {
  if (token.bits === null || token.bits === undefined) return "given";
  if (token.saved === undefined || token.saved === null) {
    const level = LEVELS.findLastIndex((least) => token.bits >= least) + 1;
    return level ? `bits-${level}` : "";
  }
  const level = CHANGES.findLastIndex((least) => Math.abs(token.saved) >= least) + 1;
  return level ? `${token.saved > 0 ? "saves" : "costs"}-${level}` : "";
}

/** Return a piece as text: SentencePiece writes a space as a low line. */
export const readable = (piece) => piece.replaceAll("▁", " ");

/** Return a piece for a card: with its spaces and line ends visible. */
const visible = (piece) => readable(piece).replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "(nothing)";

/** Return the legend of a view. */
export function legend(part) {
  const names = (kind, levels) => levels.map((least, i) => element("span", { class: `${kind}-${i + 1}` }, number(least, least % 1 ? 1 : 0)));
  const words = (text) => element("span", { class: "words" }, text);
  if (!part) return element("div", { class: "legend" }, words("bits, from"), ...names("bits", LEVELS), words(" more bits: less expected"));
  return element("div", { class: "legend" }, words(`bits that ${part} saves`), ...names("saves", CHANGES).reverse(),
    element("span", {}, "0"), ...names("costs", CHANGES), words(`bits that ${part} costs`));
}

/** The tokens of one text; the arrow keys go from one to the next. */
export class TokenView {
  constructor(label) {
    this.tokens = [];
    this.box = element("div", {
      class: "tokens", role: "listbox", "aria-label": `${label}: tokens; arrow keys go through them`,
      pointerover: (event) => this.enter(event), pointerleave: (event) => event.pointerType === "mouse" && hideCard(),
      click: (event) => this.enter(event), focusin: (event) => this.enter(event), focusout: () => hideCard(),
      keydown: (event) => this.key(event),
    });
  }

  /** Show text that was given, before the tokens. */
  begin(text) {
    this.tokens = [];
    hideCard();
    this.box.replaceChildren(element("span", { class: "given", role: "presentation" }, text));
  }

  /** Add tokens: {piece, bits, alternatives, shown?: its letters of the text, part?, saved?: bits}. */
  add(tokens) {
    for (const token of tokens) {
      const bits = token.bits === null || token.bits === undefined ? "given" : `${number(token.bits, 2)} bits`;
      const saved = token.saved === undefined || token.saved === null ? "" : `, ${number(token.saved, 2, true)} saved`;
      const text = token.shown ?? readable(token.piece);
      const letters = text.trimStart() || text; // the space before a word would be a coloured sliver at the end of a line
      const made = element("span", {
        class: "token", role: "option", "aria-selected": "false", "data-at": this.tokens.length,
        tabindex: this.tokens.length ? "-1" : "0", "aria-label": `${visible(token.piece)}, ${bits}${saved}`,
      }, text.slice(0, text.length - letters.length), element("span", { class: shade(token) }, letters));
      this.tokens.push(token);
      this.box.append(made);
    }
  }

  enter(event) {
    const made = event.target.closest?.("[data-at]");
    if (!made) return;
    for (const other of this.box.querySelectorAll('[aria-selected="true"]')) other.setAttribute("aria-selected", "false");
    made.setAttribute("aria-selected", "true");
    showCard(made, this.tokens[Number(made.dataset.at)]);
  }

  key(event) {
    const here = event.target.closest?.("[data-at]");
    const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") hideCard();
    if (!here || !(event.key in moves)) return;
    event.preventDefault();
    const at = Math.max(0, Math.min(this.tokens.length - 1, Number(here.dataset.at) + moves[event.key]));
    const next = this.box.querySelector(`[data-at="${at}"]`);
    here.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  }
}

document.addEventListener("pointerdown", (event) => { if (!event.target.closest?.("[data-at]")) hideCard(); });
window.addEventListener("resize", hideCard);

/** Hide the card of a token. */
export function hideCard() {
  if (byId("card").hidden) return;
  byId("card").hidden = true;
  for (const other of document.querySelectorAll('.token[aria-selected="true"]')) other.setAttribute("aria-selected", "false");
}

/** Show what else could have stood in a token's place, below the token. */
function showCard(made, token) {
  const card = byId("card");
  card.replaceChildren(...describe(token));
  card.hidden = false;
  const place = made.lastElementChild.getClientRects()[0];
  const wide = document.documentElement.clientWidth;
  const left = Math.max(8, Math.min(place.left, wide - card.offsetWidth - 8));
  const below = place.bottom + 6 + card.offsetHeight < window.innerHeight || place.top < card.offsetHeight;
  card.style.left = `${left + window.scrollX}px`;
  card.style.top = `${(below ? place.bottom + 6 : place.top - card.offsetHeight - 6) + window.scrollY}px`;
}

function describe(token) {
  const head = element("h3", {}, visible(token.piece));
  if (token.bits === null || token.bits === undefined) return [head, element("div", {}, "given: nothing foretold the first token")];
  const lines = [element("div", {}, `${number(token.bits, 2)} bits: probability ${chance(token.bits)}`)];
  if (token.part) {
    const change = `${token.saved < 0 ? "costs" : "saves"} ${number(Math.abs(token.saved), 2)}`;
    lines.push(element("div", {}, `${number(token.bits + token.saved, 2)} bits without ${token.part}, which ${change}`));
  }
  const rows = (token.alternatives ?? []).map((other) => {
    const here = other.piece === token.piece;
    const bar = element("span", { class: here ? "bar" : "bar small" });
    bar.style.width = `${(100 * 2 ** -other.bits).toFixed(1)}%`;
    return element("tr", { class: here ? "here" : null }, element("th", { scope: "row" }, visible(other.piece)),
      element("td", {}, chance(other.bits)), element("td", { class: "wide" }, bar));
  });
  return [head, ...lines, rows.length ? element("table", { "aria-label": "likeliest tokens here" }, element("tbody", {}, ...rows)) : null].filter(Boolean);
}

/** Return the probability that so many bits are. */
function chance(bits) {
  const share = 100 * 2 ** -bits;
  return share >= 10 ? `${number(share, 0)} %` : share >= 0.1 ? `${number(share, 1)} %` : share >= 0.001 ? `${number(share, 3)} %` : "< 0.001 %";
}
