// A line drawing that is drawn anew when its data or its width change, with a readout for pointer and keyboard.
import { element, number } from "./dom.js";

const ROOM = { left: 52, right: 14, top: 12, bottom: 40 };

/** Return round numbers between two values, about `most` of them. */
export function ticks(low, high, most) {
  const rough = (high - low) / Math.max(1, most) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  const first = Math.ceil(low / step - 1e-9);
  // Counted from `first`: beyond 2^53 a number plus 1 is the same number.
  for (let i = 0; i <= 2 * most && (first + i) * step <= high + step * 1e-9; i += 1) found.push((first + i) * step);
  return [...new Set(found)];
}

/** Return the values between which most of a drawing lies: the first steps of a training are far above the rest. */
function range(series, x) {
  const values = [];
  for (const one of series) {
    const shown = one.points.filter((point) => point[0] >= x.low + 0.04 * (x.high - x.low));
    const spread = (point) => (point[2] ? [point[1] - point[2], point[1] + point[2]] : [point[1]]);
    for (const point of shown.length > 30 ? shown : one.points) values.push(...spread(point));
    if (one.level !== undefined) values.push(one.level);
  }
  let [low, high] = values.length ? [values[0], values[0]] : [0, 1];
  for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
  const room = (high - low) * 0.08 || 0.05;
  return { low: low - room, high: high + room };
}

/**
 * A drawing of lines. Each series is {name, colour, points: [[x, y, error?]], dots?, dashed?} or {name, colour, level}
 * for a line that goes across.
 */
export class Chart {
  constructor(place, xName, yName, xText = (x) => number(x), decimals = 4) {
    Object.assign(this, { xName, yName, xText, decimals, series: [], at: null, width: 0 });
    this.box = element("div", {
      role: "application", tabindex: "0", "aria-roledescription": "line drawing", pointermove: (event) => this.point(event),
      pointerleave: () => this.readAt(null), keydown: (event) => this.key(event), blur: () => this.readAt(null),
    });
    this.keys = element("ul", { class: "keys" });
    this.readout = element("p", { class: "hint", "aria-live": "polite" });
    place.replaceChildren(this.keys, this.box, this.readout);
    new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width && width !== this.width) this.draw(this.series, width);
    }).observe(this.box);
  }

  /** Draw these series; `limit` is where the x axis ends at least. */
  draw(series, width = this.width, limit = this.limit) {
    Object.assign(this, { series, width: width || this.box.clientWidth || 600, limit });
    this.height = this.width < 500 ? 230 : 320;
    const xs = series.flatMap((one) => (one.points ?? []).map((point) => point[0]));
    let [low, high] = [xs[0] ?? 0, Math.max(xs[0] ?? 1, limit ?? -Infinity)];
    for (const x of xs) [low, high] = [Math.min(low, x), Math.max(high, x)];
    this.x = { low, high: high > low ? high : low + 1 };
    this.y = range(series.map((one) => ({ points: [], ...one })), this.x);
    const clip = element("clipPath", { id: (this.clip ??= `clip-${Math.random().toString(36).slice(2)}`) });
    clip.append(element("rect", {
      x: ROOM.left - 5, y: ROOM.top - 5, width: Math.max(0, this.width - ROOM.left - ROOM.right + 10),
      height: this.height - ROOM.top - ROOM.bottom + 10,
    }));
    this.svg = element("svg", { viewBox: `0 0 ${this.width} ${this.height}`, height: this.height, "aria-hidden": "true" },
      clip, this.axes(), element("g", { "clip-path": `url(#${this.clip})` }, ...series.flatMap((one) => this.lines(one))));
    this.box.replaceChildren(this.svg);
    const last = series.map((one) => `${one.name} ${number(one.level ?? one.points.at(-1)?.[1], this.decimals)}`);
    this.box.setAttribute("aria-label", `${this.yName} against ${this.xName}: ${last.join(", ") || "nothing yet"}. Arrow keys read values.`);
    this.keys.replaceChildren(...series.map((one) => this.keyOf(one)));
    this.readAt(this.at);
  }

  /** Return the entry of a series above the drawing. */
  keyOf(one) {
    const kind = one.dots ? "dots" : one.dashed || one.level !== undefined ? "dashed" : null;
    const value = one.level ?? one.points.at(-1)?.[1];
    return element("li", { class: `c-${one.colour}` }, element("i", { class: kind }),
      element("span", {}, `${one.name}${value === undefined ? "" : ` ${number(value, this.decimals)}`}`));
  }

  px(x) { return ROOM.left + ((x - this.x.low) / (this.x.high - this.x.low)) * (this.width - ROOM.left - ROOM.right); }

  py(y) {
    const share = (y - this.y.low) / (this.y.high - this.y.low);
    return ROOM.top + (1 - Math.max(-0.5, Math.min(1.5, share))) * (this.height - ROOM.top - ROOM.bottom);
  }

  axes() {
    const made = element("g");
    const levels = ticks(this.y.low, this.y.high, this.height < 300 ? 4 : 6);
    const decimals = Math.max(0, Math.min(6, -Math.floor(Math.log10((levels[1] ?? 1) - (levels[0] ?? 0) || 1) + 1e-9)));
    for (const y of levels) {
      made.append(element("line", { class: "gridline", x1: ROOM.left, x2: this.width - ROOM.right, y1: this.py(y), y2: this.py(y) }));
      made.append(element("text", { x: ROOM.left - 8, y: this.py(y) + 4, "text-anchor": "end" }, number(y, decimals)));
    }
    const bottom = this.height - ROOM.bottom;
    for (const x of ticks(this.x.low, this.x.high, this.width < 500 ? 4 : 8)) {
      const anchor = this.px(x) > this.width - 30 ? "end" : "middle";
      made.append(element("text", { x: this.px(x), y: bottom + 17, "text-anchor": anchor }, this.xText(x)));
    }
    made.append(element("text", { x: this.width - ROOM.right, y: this.height - 4, "text-anchor": "end" }, `${this.yName} against ${this.xName}`));
    return made;
  }

  /** Return the marks of one series. */
  lines(one) {
    const shape = `c-${one.colour} line${one.dashed || one.level !== undefined ? " dashed" : ""}`;
    if (one.level !== undefined) {
      return [element("line", { class: shape, x1: ROOM.left, x2: this.width - ROOM.right, y1: this.py(one.level), y2: this.py(one.level) })];
    }
    const places = one.points.map((point) => `${this.px(point[0]).toFixed(1)} ${this.py(point[1]).toFixed(1)}`);
    const made = [element("path", { class: shape, d: places.length ? `M${places.join("L")}` : "" })];
    const dots = one.dots || one.points.length === 1 ? one.points : [];
    for (const [x, y, error] of dots.slice(-200)) {
      const [cx, cy] = [this.px(x), this.py(y)];
      if (error) made.push(element("line", { class: `c-${one.colour} whisker`, x1: cx, x2: cx, y1: this.py(y - error), y2: this.py(y + error) }));
      made.push(element("circle", { class: `c-${one.colour} dot`, cx, cy, r: 3.5 }));
    }
    return made;
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.width;
    this.readAt(this.x.low + ((x - ROOM.left) / (this.width - ROOM.left - ROOM.right)) * (this.x.high - this.x.low));
  }

  key(event) {
    const xs = [...new Set(this.series.flatMap((one) => (one.points ?? []).map((point) => point[0])))].sort((a, b) => a - b);
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || !xs.length) return;
    event.preventDefault();
    const here = this.at === null ? xs.length : xs.findIndex((x) => x >= this.at);
    this.readAt(xs[Math.max(0, Math.min(xs.length - 1, (here < 0 ? xs.length : here) + moves[event.key]))]);
  }

  /** Show the values nearest to a place of the x axis; null: none. */
  readAt(at) {
    this.at = at;
    this.svg?.querySelector(".cursor")?.remove();
    const nearest = (points) => points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best));
    const lines = this.series.filter((one) => one.points?.length).map((one) => ({ one, point: nearest(one.points) }));
    if (at === null || !lines.length) {
      this.readout.textContent = "\u00a0";
      return;
    }
    const x = this.px(nearest(lines.map((line) => line.point))[0]);
    this.svg.append(element("line", { class: "cursor", x1: x, x2: x, y1: ROOM.top, y2: this.height - ROOM.bottom }));
    const words = lines.map(({ one, point }) =>
      `${one.name} ${number(point[1], this.decimals)}${point[2] ? ` ± ${number(point[2], this.decimals)}` : ""} at ${this.xText(point[0])}`);
    this.readout.textContent = words.join(" · ");
  }
}
