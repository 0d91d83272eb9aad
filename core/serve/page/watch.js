// The page of `skc watch`: what the server tells of a run or of an ablation, as it comes.
import { byId, element } from "./dom.js";
import { RunView } from "./watch_run.js";
import { StoreView } from "./watch_store.js";

const VIEWS = { run: RunView, store: StoreView };
const name = new URLSearchParams(location.search).get("name");
let view = null;

/** Say in the line below the title how things stand. */
export function say(badge, colour, words) {
  byId("badge").textContent = badge;
  byId("badge").className = `badge c-${colour}`;
  byId("words").textContent = words;
}

function offer(names, shown) {
  byId("names").hidden = names.length < 2;
  byId("name").replaceChildren(...names.map((one) => element("option", { value: one, selected: one === shown }, one)));
  byId("name").onchange = () => { location.search = `?name=${encodeURIComponent(byId("name").value)}`; };
}

const source = new EventSource(`api/watch${name ? `?name=${encodeURIComponent(name)}` : ""}`);
source.addEventListener("open", () => { byId("problem").textContent = ""; });
source.addEventListener("error", () => {
  say("no connection", "worse", "skc watch has ended, or does not answer; this page goes on when it does");
});
source.addEventListener("problem", (event) => {
  byId("problem").textContent = JSON.parse(event.data).message;
});
source.addEventListener("all", (event) => {
  const told = JSON.parse(event.data);
  if (!(view instanceof VIEWS[told.kind])) {
    view?.close();
    view = new VIEWS[told.kind](byId("view"), say);
  }
  offer(told.names ?? [], told.store?.name);
  view.all(told);
  document.body.dataset.ready = "yes";
});
source.addEventListener("more", (event) => view?.more(JSON.parse(event.data)));
