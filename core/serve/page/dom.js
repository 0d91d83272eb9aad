// Elements, and numbers as people read them. Texts become text nodes, so that nothing in them is markup.

/** Return an element; attributes that are functions are listeners, those that are false or null are left out. */
export function element(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "circle", "text", "rect", "clipPath"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Return the element of an id. */
export const byId = (id) => document.getElementById(id);

/** Return a number with so many decimals, thousands apart and a true minus sign. */
export function number(value, decimals = 0, sign = false) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const text = Math.abs(value).toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  const zero = Number(text.replaceAll(",", "")) === 0;
  return (value < 0 && !zero ? "−" : sign ? "+" : "") + text;
}

/** Return bytes as people read them. */
export function bytes(value) {
  if (value === null || value === undefined) return "–";
  return value < 10_000 ? `${number(value)} bytes` : value < 1e6 ? `${number(value / 1e3, 0)} kB` : `${number(value / 1e6, 1)} MB`;
}

/** Return seconds as the console writes them: 45s, 3m20s, 2h05m. */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const two = (value) => String(value).padStart(2, "0");
  if (whole < 60) return `${whole}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m${two(whole % 60)}s`;
  return `${Math.floor(whole / 3600)}h${two(Math.floor(whole / 60) % 60)}m`;
}

/** Return a list of terms and what they are. */
export function facts(pairs) {
  return element("dl", {}, ...pairs.map(([term, text]) => element("div", {}, element("dt", {}, term), element("dd", {}, String(text)))));
}

/** Return a table in a box that scrolls sideways; columns named in `words` are text. */
export function table(title, head, rows, words = [], tall = false) {
  const kind = (i) => (words.includes(head[i]) ? { class: "words" } : {});
  const body = rows.map((row) =>
    element("tr", {}, ...row.map((cell, i) => element(i ? "td" : "th", { ...kind(i), ...(i ? {} : { scope: "row" }) }, cell))),
  );
  const top = element("tr", {}, ...head.map((name, i) => element("th", { scope: "col", ...kind(i) }, name)));
  const box = { class: tall ? "scroll tall" : "scroll", tabindex: "0", role: "region", "aria-label": title };
  return element("div", box, element("table", {}, element("thead", {}, top), element("tbody", {}, ...body)));
}
