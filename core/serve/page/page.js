// The page of `skc serve`: write with a model, read a text token by token, measure a whole text.
import { Chart } from "./chart.js";
import { byId, bytes, element, number, table } from "./dom.js";
import { askEvents, askJson } from "./stream.js";
import { TokenView, legend } from "./tokens.js";

const state = { models: [], limits: {} };

/** Return the models that are chosen: the first, and the one beside it if there is one. */
function chosen() {
  const names = [byId("model-0"), byId("model-1")].filter(Boolean).map((select) => select.value);
  return [...new Set(names)].map((name) => state.models.find((model) => model.name === name)).filter(Boolean);
}

/** Return the card of a model's choice. */
function choice(i) {
  const id = `model-${i}`;
  const select = element("select", { id, change: showModels });
  if (i) select.append(element("option", { value: "" }, "none"));
  for (const model of state.models) select.append(element("option", { value: model.name }, model.name));
  select.value = i ? "" : state.models[0].name;
  return element("div", {}, element("label", { for: id }, i ? "Beside it" : "Model"), select, element("div", { id: `${id}-facts` }));
}

function showModels() {
  const shown = [byId("model-0"), byId("model-1")];
  for (const select of shown.filter(Boolean)) {
    const model = state.models.find((one) => one.name === select.value);
    const about = model ? [
      `${number(model.parameters)} parameters`, model.bytes ? `artifact of ${bytes(model.bytes)}` : "no artifact yet",
      `vocabulary of ${number(model.vocab)}`, model.score ? `${number(model.score, 4)} bits per byte${model.label === "estimate" ? " (an estimate)" : ""}` : "not scored yet",
      model.limit ? `looks back on ${number(model.limit)} tokens` : "looks back on everything", model.backend,
    ] : [];
    byId(`${select.id}-facts`).replaceChildren(element("p", { class: "hint" }, about.filter(Boolean).join(" · ")));
  }
  const models = chosen();
  const drafts = models.map((model) => model.drafts ?? ["none"]).reduce((a, b) => a.filter((name) => b.includes(name)), models[0]?.drafts ?? ["none"]);
  const before = byId("draft").value;
  byId("draft").replaceChildren(...drafts.map((name) => element("option", { value: name }, name)));
  byId("draft").value = drafts.includes(before) ? before : "none";
  const parts = [...new Set(models.flatMap((model) => model.parts))];
  const part = document.querySelector('input[name="part"]:checked')?.value ?? "";
  byId("parts").replaceChildren(...["", ...parts].map((name) => element("label", {},
    element("input", { type: "radio", name: "part", value: name, checked: name === (parts.includes(part) ? part : "") }),
    name ? `what ${name} saves` : "bits")));
}

/** Return an error as words, where it belongs; nothing for a request that was stopped. */
function complain(place, error) {
  byId(place).textContent = error.name === "AbortError" ? "" : error.message;
}

/** Return places for the answers of the chosen models: [model, place, view, figures] each. */
function answers(place, models) {
  const made = models.map((model) => {
    const view = new TokenView(model.name);
    const figures = element("p", { class: "figures", role: "status" });
    const box = element("section", { class: "answer", "aria-label": model.name }, models.length > 1 ? element("h3", {}, model.name) : null, view.box, figures);
    return { model, box, view, figures };
  });
  byId(place).className = models.length > 1 ? "answers two" : "answers";
  byId(place).replaceChildren(...made.map((one) => one.box));
  return made;
}

/** Do work for every model at once, with a button that stops it; errors of one model stand in its answer. */
async function each(name, made, work) {
  const stopping = new AbortController();
  const [go, stop] = [byId(`${name}-go`), byId(`${name}-stop`)];
  const halt = () => stopping.abort();
  go.disabled = true;
  if (stop) stop.disabled = false;
  stop?.addEventListener("click", halt);
  await Promise.all(made.map(async (one) => {
    one.box?.classList.add("busy");
    try {
      await work(one, stopping.signal);
    } catch (error) {
      if (made.length === 1 || !one.figures) complain(`${name}-error`, error);
      else one.figures.replaceChildren(element("span", { class: "error" }, error.name === "AbortError" ? "stopped" : error.message));
      if (error.name === "AbortError" && one.figures) one.figures.append(" · stopped");
    }
    one.box?.classList.remove("busy");
  }));
  stop?.removeEventListener("click", halt);
  go.disabled = false;
  if (stop) stop.disabled = true;
}

const REASONS = { tokens: "all that were asked for", end: "the document ends here", seconds: "the time of a request was over" };

async function write(event) {
  event.preventDefault();
  complain("write-error", { message: "" });
  const value = (id) => Number(byId(id).value);
  const asked = {
    prompt: byId("prompt").value, tokens: value("tokens"), temperature: value("temperature"), top_p: value("top_p"),
    top_k: byId("top_k").value ? value("top_k") : null, seed: value("seed"), draft: byId("draft").value,
  };
  byId("write-read").hidden = true;
  byId("write-legend").replaceChildren(legend());
  const made = answers("write-answers", chosen());
  await each("write", made, async (one, signal) => {
    one.view.begin(asked.prompt);
    one.text = asked.prompt;
    let [count, bits] = [0, 0];
    for await (const [name, told] of askEvents("api/generate", { model: one.model.name, ...asked }, signal)) {
      if (name === "token") {
        one.text += told.text;
        const alone = told.tokens.length === 1; // of several at once nothing tells whose letters are whose
        one.view.add(told.tokens.map((token) => (alone ? { ...token, shown: told.text || "·" } : token)));
        for (const token of told.tokens) [count, bits] = [count + 1, bits + token.bits];
      }
      const speed = name === "done" ? ` · ${number(told.tokens_per_second, 1)} tokens/s · ${REASONS[told.reason] ?? told.reason}` : "";
      one.figures.textContent = `${number(count)} tokens · ${number(bits / Math.max(1, count), 2)} bits a token${speed}`;
    }
  });
  byId("write-read").hidden = !made[0]?.text;
  byId("write-read").onclick = () => {
    byId("text").value = made[0].text;
    show("read");
    byId("read-form").requestSubmit();
  };
}

/** Return a text's tokens as a view shows them: each with the letters that are its own, and what a part saves. */
function spelled(answer, part, has) {
  const letters = Array.from(answer.read_as ?? "");
  return answer.tokens.map((token) => ({
    ...token, saved: part ? token.without ?? 0 : null, part: has ? part : null,
    shown: answer.read_as === undefined ? undefined : letters.slice(token.start, token.end).join("") || "·",
  }));
}

async function read(event) {
  event.preventDefault();
  complain("read-error", { message: "" });
  const part = document.querySelector('input[name="part"]:checked')?.value || null;
  byId("read-legend").replaceChildren(legend(part));
  await each("read", answers("read-answers", chosen()), async (one, signal) => {
    const without = part && one.model.parts.includes(part) ? part : null;
    const asked = { model: one.model.name, text: byId("text").value, ...(without ? { without } : {}) };
    const answer = await askJson("api/tokens", asked, signal);
    const tokens = spelled(answer, part, without);
    one.view.box.replaceChildren();
    one.view.add(tokens);
    const saved = tokens.reduce((sum, token) => sum + (token.saved ?? 0), 0);
    one.figures.replaceChildren(element("b", {}, `${number(answer.bpb, 4)} bits per byte`),
      ` · ${number(answer.bits, 1)} bits for ${number(answer.bytes)} bytes in ${number(tokens.length)} tokens`);
    if (without) {
      const share = (100 * saved) / (answer.bits + saved);
      one.figures.append(" · ", element("b", {}, `${without} ${saved < 0 ? "costs" : "saves"} ${number(Math.abs(saved), 1)} bits`),
        ` of ${number(answer.bits + saved, 1)} without it (${number(Math.abs(share), 1)} %)`);
    } else if (part) one.figures.append(` · it has no ${part}`);
  });
}

const COLOURS = ["better", "worse"];

async function score(event) {
  event.preventDefault();
  complain("score-error", { message: "" });
  const text = byId("file").files.length ? await byId("file").files[0].text() : byId("whole").value;
  if (!text) return complain("score-error", { message: "choose a file, or paste a text" });
  const most = state.limits.body;
  const size = new TextEncoder().encode(text).length;
  if (most && size > most) return complain("score-error", { message: `the text has ${number(size)} bytes; this server takes ${number(most)}` });
  const found = [];
  byId("score-figure").hidden = true;
  byId("score-table").replaceChildren();
  await each("score", chosen().map((model) => ({ model })), async (one, signal) => {
    byId("score-state").textContent = "measuring …";
    for await (const [name, told] of askEvents(`api/score?model=${encodeURIComponent(one.model.name)}`, text, signal)) {
      if (name === "done" || told.series) found.push({ name: one.model.name, ...told });
      else if (told.total) byId("score-state").textContent = `measuring: ${number((100 * told.done) / told.total)} %`;
    }
  });
  byId("score-state").textContent = "";
  const names = chosen().map((model) => model.name); // as they are chosen, not as they came
  found.sort((a, b) => names.indexOf(a.name) - names.indexOf(b.name));
  if (found.length) showScore(found);
}

function showScore(found) {
  const lines = found.flatMap((one, i) => [
    ...(found.length === 1 && one.series[0]?.here !== undefined ? [{ name: "between two points", colour: "noise", points: one.series.map((p) => [p.byte, p.here]) }] : []),
    { name: one.name, colour: COLOURS[i], points: one.series.map((point) => [point.byte, point.bpb]) },
  ]);
  const levels = [["bz2", "third"], ["brotli", "ink"]].filter(([name]) => found[0][name]);
  byId("score-figure").hidden = false;
  state.chart ??= new Chart(byId("score-chart"), "place in the text (bytes)", "bits per byte", (x) => number(x), 3);
  state.chart.draw([...lines, ...levels.map(([name, colour]) => ({ name, colour, level: found[0][name] }))], byId("score-chart").clientWidth);
  const size = found[0].bytes;
  const rows = [...found.map((one) => [one.name, one.bpb]), ...levels.map(([name]) => [name, found[0][name]])];
  byId("score-table").replaceChildren(table("Bits per byte of the whole text", ["", "bits per byte", "bytes it comes to", "of the text"],
    rows.map(([name, bpb]) => [name, number(bpb, 4), number((bpb * size) / 8), `${number((100 * bpb) / 8, 1)} %`])));
}

/** Show one of the three panels. */
function show(name) {
  for (const tab of document.querySelectorAll('[role="tab"]')) {
    const here = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", String(here));
    tab.setAttribute("tabindex", here ? "0" : "-1");
    byId(tab.getAttribute("aria-controls")).hidden = !here;
  }
  byId("card").hidden = true;
  history.replaceState(null, "", `#${name}`);
}

function tabs() {
  const all = [...document.querySelectorAll('[role="tab"]')];
  for (const [i, tab] of all.entries()) {
    tab.addEventListener("click", () => show(tab.getAttribute("aria-controls")));
    tab.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      const next = all[(i + move + all.length) % all.length];
      show(next.getAttribute("aria-controls"));
      next.focus();
    });
  }
  const asked = location.hash.slice(1);
  if (all.some((tab) => tab.getAttribute("aria-controls") === asked)) show(asked);
}

async function start() {
  tabs();
  byId("write-form").addEventListener("submit", write);
  byId("read-form").addEventListener("submit", read);
  byId("score-form").addEventListener("submit", score);
  byId("whole").addEventListener("input", () => { byId("file").value = ""; });
  try {
    Object.assign(state, await askJson("api/models"));
  } catch (error) {
    return complain("problem", error);
  }
  byId("models").replaceChildren(choice(0), ...(state.models.length > 1 ? [choice(1)] : []));
  if (state.limits.tokens) byId("tokens").max = state.limits.tokens;
  if (state.models.length > 1) byId("model-1").value = state.models[1].name;
  showModels();
  document.body.dataset.ready = "yes";
}

start();
