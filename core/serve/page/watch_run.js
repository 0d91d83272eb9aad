// A run under way: its curve, its last figures, samples, settings and steps.
import { Chart } from "./chart.js";
import { byId, bytes, duration, element, facts, number, table } from "./dom.js";

const STEPS_SHOWN = 200;
const STATES = { waiting: ["waiting", "noise"], training: ["training", "better"], finished: ["finished", "third"] };
/** Seconds without a line after which the page says how long it has been. */
const QUIET = 60;

export class RunView {
  constructor(place, say) {
    this.say = say;
    this.rows = [];
    const part = (id) => element("div", { id });
    this.bar = element("progress", { max: "1", value: "0", "aria-label": "share of the training that is done" });
    place.replaceChildren(this.bar, part("figures"), element("h2", {}, "Curve"), element("figure", {}, part("curve")),
      part("samples"), element("h2", {}, "Steps"), part("steps"), element("h2", {}, "Settings"), part("settings"));
    this.chart = new Chart(byId("curve"), "step", "bits per byte");
    this.clock = setInterval(() => this.age(), 1000);
  }

  /** Say nothing any more: another view has taken the place. */
  close() { clearInterval(this.clock); }

  all(told) {
    this.run = told.run;
    this.rows = told.rows;
    byId("title").textContent = this.run ? this.run.name : "skc watch";
    document.title = this.run ? `${this.run.name}: skc watch` : "skc watch";
    byId("purpose").textContent = this.run ? `Preset ${this.run.preset}, seed ${this.run.seed}${this.run.purpose && `: ${this.run.purpose}`}.` : "";
    this.settings();
    this.show(told);
  }

  more(told) {
    this.rows = [...this.rows, ...told.rows].slice(-8000);
    this.show(told);
  }

  show(told) {
    this.state = told;
    this.seen = Date.now();
    this.figures();
    this.curve();
    this.samples();
    this.steps();
    this.age();
  }

  /** Say the state, and how long ago the last line came where that is long. */
  age() {
    if (!this.state) return;
    const quiet = (Date.now() - this.seen) / 1000;
    const words = [this.state.words];
    if (this.state.unread) words.push(`${number(this.state.unread)} lines of metrics.jsonl could not be read`);
    if (this.state.state === "training" && this.state.left !== null && quiet < QUIET) words.push(`about ${duration(this.state.left - quiet)} of training left`);
    if (this.state.state === "training" && quiet >= QUIET) words.push(`no new line for ${duration(quiet)}: it evaluates, or has stopped`);
    this.say(...STATES[this.state.state], words.filter(Boolean).join("; "));
  }

  /** Return the newest value of a metric, and the row that it stands in. */
  last(name) {
    const row = this.rows.findLast((one) => name in one);
    return row ? { value: row[name], row } : null;
  }

  figures() {
    const [run, loss, val] = [this.run, this.last("train/loss"), this.last("val/bpb")];
    const [final, stored] = [this.last("final/score")?.value, this.last("final/artifact")?.value];
    const step = loss?.row.step ?? this.rows.at(-1)?.step ?? 0;
    const clock = this.last("clock/seconds")?.value ?? 0;
    const share = !run ? 0 : run.seconds ? clock / run.seconds : step / run.steps;
    this.bar.value = this.state.state === "finished" ? 1 : Math.min(1, share);
    const shown = [
      ["step", run && !run.seconds ? `${number(step)} of ${number(run.steps)}` : number(step)],
      this.last("train/bpb") || !loss ? ["training bits per byte", number(this.last("train/bpb")?.value, 4)] : ["nats per token", number(loss.value, 4)],
      ["validation", val ? `${number(val.value, 4)}${val.row["val/error"] ? ` ± ${number(val.row["val/error"], 4)}` : ""}` : "–"],
      final ? [`final ${final.label}`, number(final.bpb, 4)] : null,
      stored ? ["artifact", `${bytes(stored.bytes)}${stored.within === false ? ", over the budget" : ""}`] : null,
      ["speed", this.last("perf/tok_s") ? `${number(this.last("perf/tok_s").value)} tokens/s` : "–"],
      ["time of a step", this.last("perf/step_ms") ? `${number(this.last("perf/step_ms").value)} ms` : "–"],
      ["time trained", run?.seconds ? `${duration(clock)} of ${duration(run.seconds)}` : duration(clock)],
      this.last("perf/memory") ? ["memory at most", bytes(this.last("perf/memory").value)] : null,
      ["learning rate", this.last("opt/lr") ? this.last("opt/lr").value.toExponential(2) : "–"],
      ...(run?.facts ?? []),
    ];
    byId("figures").replaceChildren(facts(shown.filter(Boolean)));
  }

  curve() {
    const name = this.last("train/bpb") ? "train/bpb" : "train/loss";
    const points = (key) => this.rows.filter((row) => key in row).map((row) => [row.step, row[key], row["val/error"] && key.startsWith("val") ? row["val/error"] : 0]);
    const series = [{ name: "training", colour: "better", points: points(name) }];
    if (name === "train/bpb" && points("val/bpb").length) series.push({ name: "validation estimate", colour: "worse", dots: true, points: points("val/bpb") });
    const final = this.last("final/score");
    if (name === "train/bpb" && final) series.push({ name: `final ${final.value.label}`, colour: "third", level: final.value.bpb });
    this.chart.yName = name === "train/bpb" ? "bits per byte" : "nats per token";
    this.chart.draw(series, undefined, this.run && !this.run.seconds ? this.run.steps : undefined);
  }

  samples() {
    const rows = this.rows.filter((row) => row.samples?.length);
    const key = rows.map((row) => row.step).join();
    if (key === this.sampled) return;
    this.sampled = key;
    const texts = (row) => row.samples.map((text) => element("blockquote", {}, text));
    const last = rows.at(-1);
    const earlier = rows.slice(0, -1).reverse().slice(0, 20).map((row) => element("details", {}, element("summary", {}, `step ${number(row.step)}`), ...texts(row)));
    byId("samples").replaceChildren(...(last ? [element("h2", {}, "Samples"), element("p", { class: "hint" }, `after step ${number(last.step)}`), ...texts(last)] : []),
      ...(earlier.length ? [element("p", { class: "hint" }, "Earlier:"), ...earlier] : []));
  }

  steps() {
    const rows = this.rows.filter((row) => "train/loss" in row || "val/bpb" in row).slice(-STEPS_SHOWN).reverse();
    const cells = rows.map((row) => [
      number(row.step), number(row["train/loss"], 4), number(row["train/bpb"], 4), number(row["val/bpb"], 4),
      row["opt/lr"]?.toExponential(2) ?? "–", number(row["train/grad_norm"], 3), number(row["perf/tok_s"]), number(row["perf/step_ms"]),
      "clock/seconds" in row ? duration(row["clock/seconds"]) : "–",
    ]);
    const head = ["step", "loss", "bits per byte", "validation", "learning rate", "gradient norm", "tokens/s", "ms", "clock"];
    const scrolled = byId("steps").firstElementChild?.scrollTop ?? 0;
    byId("steps").replaceChildren(rows.length ? table("Steps, the newest first", head, cells, [], true) : element("p", { class: "quiet" }, "No step yet."));
    byId("steps").firstElementChild.scrollTop = scrolled;
  }

  settings() {
    const run = this.run;
    const pre = (lines) => element("pre", {}, element("code", {}, lines.join("\n")));
    byId("settings").replaceChildren(...(run ? [
      element("p", { class: "quiet" }, run.settings.length ? `Preset ${run.preset} with:` : `Preset ${run.preset} as it is.`),
      run.settings.length ? pre(run.settings) : "", run.command ? pre([run.command]) : "",
      run.notes.length ? element("details", {}, element("summary", {}, "Notes of the start"), ...run.notes.map((note) => element("p", { class: "hint" }, note))) : "",
    ] : []));
  }
}
