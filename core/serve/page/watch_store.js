// An ablation under way: its runs by variant and seed, what they show so far, their curves.
import { Chart } from "./chart.js";
import { byId, duration, element, facts, number, table } from "./dom.js";

const COLOURS = ["better", "worse", "third", "ink", "noise"];
const MOST_POINTS = 240;

export class StoreView {
  constructor(place, say) {
    this.say = say;
    const part = (id) => element("div", { id });
    place.replaceChildren(part("facts"), part("report"), part("findings"), element("h2", {}, "Runs"), part("runs"), element("h2", {}, "Curves"),
      element("p", { class: "hint" }, "Training bits per byte, a line for each run."), element("figure", {}, part("curves")), part("failed"));
    this.chart = new Chart(byId("curves"), "step", "bits per byte");
  }

  close() {}

  all(told) {
    this.store = told.store;
    this.runs = new Map();
    byId("title").textContent = this.store?.name ?? "skc watch";
    document.title = `${this.store?.name ?? "skc watch"}: skc watch`;
    byId("purpose").textContent = this.store?.purpose ?? "";
    this.words = told.words;
    this.show({ facts: [], findings: [], ...told });
  }

  more(told) {
    this.show(told);
  }

  show(told) {
    for (const run of told.runs) {
      const points = [...(run.anew ? [] : this.runs.get(this.id(run))?.points ?? []), ...run.points];
      this.runs.set(this.id(run), { ...run, points: points.length > MOST_POINTS ? points.filter((_, i) => i % 2 || i === points.length - 1) : points });
    }
    if (told.facts) byId("facts").replaceChildren(facts(told.facts));
    const link = element("a", { href: `report?name=${encodeURIComponent(this.store?.name ?? "")}` }, "The report that skc ablate wrote last");
    byId("report").replaceChildren(...(told.report ? [element("p", {}, link, ", with curves over seeds, equal steps, seconds and bytes.")] : []));
    if (told.findings) this.findings(told.findings);
    this.grid();
    this.curves();
    const runs = [...this.runs.values()];
    const count = (status) => runs.filter((run) => run.status === status).length;
    const failed = runs.filter((run) => run.status === "failed");
    byId("failed").replaceChildren(...(failed.length ? [element("h2", {}, "Failed runs"),
      ...failed.flatMap((run) => [element("h3", {}, `${run.variant}, seed ${run.seed}, ${run.backend}`), element("pre", {}, element("code", {}, run.message ?? "it left no message"))])] : []));
    if (!this.store) return this.say("waiting", "noise", this.words);
    const words = `${count("done")} of ${runs.length} runs done${failed.length ? `, ${failed.length} failed` : ""}`;
    if (count("running")) this.say("training", "better", `${words}, ${count("running")} running`);
    else if (count("done") + failed.length === runs.length) this.say("finished", "third", words);
    else this.say("waiting", "noise", `${words}; no run is under way`);
  }

  id(run) { return `${run.variant}\n${run.seed}\n${run.backend}`; }

  /** Show what every run has come to, by variant and seed. */
  grid() {
    const runs = [...this.runs.values()];
    const backends = [...new Set(runs.map((run) => run.backend))];
    const columns = [...new Map(runs.map((run) => [`${run.seed} ${run.backend}`, run])).values()];
    const cell = (run) => {
      if (!run) return "";
      if (run.status === "done") return element("span", {}, number(run.bpb, 4));
      if (run.status === "failed") return element("span", { class: "c-worse" }, "failed");
      if (run.status === "waiting") return element("span", { class: "quiet" }, "waits");
      const share = run.steps ? `${number((100 * (run.step ?? 0)) / run.steps)} %` : `step ${number(run.step ?? 0)}`;
      return element("span", { class: "c-better" }, `${share}${run.training ? ` · ${number(run.training, 3)}` : ""}${run.left === null || run.left === undefined ? "" : ` · ${duration(run.left)}`}`);
    };
    const rows = (this.store?.variants ?? []).map((variant) => [variant,
      ...columns.map((column) => cell(this.runs.get(this.id({ variant, seed: column.seed, backend: column.backend }))))]);
    const head = ["variant", ...columns.map((run) => `seed ${run.seed}${backends.length > 1 ? `, ${run.backend}` : ""}`)];
    byId("runs").replaceChildren(table("Runs by variant and seed", head, rows));
  }

  curves() {
    const variants = this.store?.variants ?? [];
    const series = [...this.runs.values()].filter((run) => run.points.length).map((run) => ({
      name: `${run.variant}, seed ${run.seed}`, colour: COLOURS[variants.indexOf(run.variant) % COLOURS.length], points: run.points,
    }));
    this.chart.draw(series);
    // One entry for each variant: the drawing's own would be one for each run.
    this.chart.keys.replaceChildren(...variants.filter((variant) => series.some((one) => one.name.startsWith(`${variant}, seed `))).map((variant) =>
      element("li", { class: `c-${COLOURS[variants.indexOf(variant) % COLOURS.length]}` }, element("i"), element("span", {}, variant))));
  }

  findings(backends) {
    const made = [];
    for (const one of backends) {
      const name = backends.length > 1 ? ` on ${one.backend}` : "";
      if (!one.rows.length) continue;
      made.push(element("h2", {}, `Answers so far${name}`), element("ul", { class: "verdicts" }, ...one.answers.map((answer) => {
        const kind = ["better", "worse"].find((word) => answer.verdict.split(" ")[0] === word) ?? "noise";
        return element("li", { class: kind }, element("strong", {}, answer.variant), " · ", element("b", { class: `c-${kind}` }, answer.verdict), element("br"), answer.words);
      })));
      if (one.resolution) made.push(element("p", {}, one.resolution));
      if (one.effects.length) made.push(element("h2", {}, `Differences${name}`), differences(one.effects, this.store.reference));
      if (one.doubts.length) made.push(element("details", {}, element("summary", {}, "Read with care"), element("ul", {}, ...one.doubts.map((doubt) => element("li", {}, doubt)))));
      made.push(element("h2", {}, `Table${name}`), table("All variants", one.head, one.rows, ["variant", "verdict"]));
    }
    byId("findings").replaceChildren(...made);
  }
}

/** Return a drawing of paired differences with their intervals, a ring for each seed. */
function differences(effects, reference) {
  const sizes = effects.flatMap((one) => [one.mean, one.low ?? one.mean, one.high ?? one.mean, ...one.differences]).map(Math.abs);
  const most = Math.max(...sizes, 1e-6) * 1.05;
  const x = (value) => `${(50 + (45 * value) / most).toFixed(2)}%`;
  const rows = effects.map((one) => {
    const colour = ["better", "worse"].includes(one.verdict) ? one.verdict : "noise";
    const svg = element("svg", { height: 30, "aria-hidden": "true" },
      element("line", { class: "gridline", x1: "50%", x2: "50%", y1: 0, y2: 30 }),
      one.low === null ? null : element("line", { class: `line c-${colour}`, x1: x(one.low), x2: x(one.high), y1: 11, y2: 11 }),
      element("circle", { class: `dot c-${colour}`, cx: x(one.mean), cy: 11, r: 4.5 }),
      ...one.differences.map((value) => element("circle", { class: `ring c-${colour}`, cx: x(value), cy: 23, r: 3 })));
    const interval = one.low === null ? "no interval yet" : `${number(one.low, 4, true)} to ${number(one.high, 4, true)}`;
    return element("div", { class: "difference" }, element("div", {}, element("strong", {}, one.variant), " ", element("span", { class: "hint" }, `${number(one.mean, 4, true)} (${interval})`)), svg);
  });
  return element("figure", {}, ...rows, element("figcaption", {},
    `Difference to ${reference} in bits per byte: mean, 95 % interval, a ring for each seed. The line is 0; left of it is better.`));
}
