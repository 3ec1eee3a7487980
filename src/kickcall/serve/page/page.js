// Which view is shown, and what is it told? A stream of events for the view, drawn once a frame.
import { h, setText } from "./dom.js";
import { makeMachine } from "./machine.js";
import { makeOverview } from "./overview.js";
import { makeQueueView } from "./queue.js";
import { makeTimeline } from "./timeline.js";

const main = document.getElementById("main");
const link = document.getElementById("link");
const crumbs = document.getElementById("crumbs");
const trouble = document.getElementById("trouble");
const announce = document.getElementById("announce");
let stream = null;
let mayInject = false;

function makeTimelinePage() {
  const timeline = makeTimeline();
  return {
    node: h("div", {}, h("h1", {}, "What happened"), timeline.node),
    title: () => "Time line",
    crumbs: () => [["Time line", null]],
    update: (state, changed) => timeline.update(state, changed, () => true),
  };
}

function makeGone() {
  const why = h("p", {});
  return {
    node: h("div", {}, h("h1", {}, "Not here"), why, h("p", {}, h("a", { href: "/" }, "All machines"))),
    title: () => "Not here",
    crumbs: () => [],
    update: (state) => setText(why, state.why),
  };
}

// What the address says: the view, and what its stream is asked for.
function route() {
  const asked = new URLSearchParams(location.search);
  const name = asked.get("name") || "";
  const query = new URLSearchParams();
  if (location.pathname === "/machine") {
    query.set("machine", name);
    return { query, make: () => makeMachine(name) };
  }
  if (location.pathname === "/queue") {
    const [device, queue] = [asked.get("device") || "", asked.get("queue") || ""];
    query.set("machine", name);
    query.set("device", device);
    query.set("queue", queue);
    return { query, make: () => makeQueueView(name, device, queue, { mayInject: () => mayInject }) };
  }
  return { query, make: location.pathname === "/timeline" ? makeTimelinePage : makeOverview };
}

function merge(state, changed) {
  for (const [key, value] of Object.entries(changed)) {
    if (key === "machines" || key === "queues") {
      if (typeof value === "object") state[key] = { ...(state[key] || {}), ...value };
      else state[key] = value;
    } else if (key === "machines_gone" || key === "queues_gone") {
      for (const name of value) delete state[key.slice(0, -5)][name];
    } else state[key] = value;
  }
}

function tellStalls(state, before) {
  const worst = state.worst || [];
  if (worst.length > before) {
    const one = worst[worst.length - 1];
    setText(announce, `${one.verdict.word}: ${one.machine} ${one.name} queue ${one.queue}`);
  }
  return worst.length;
}

function show() {
  stream?.close();
  const { query, make } = route();
  let view = null;
  let state = {};
  let pending = null;
  let stalls = 0;
  const mine = (stream = new EventSource(`/events?${query}`));

  function draw() {
    const changed = pending;
    pending = null;
    if (!changed || stream !== mine) return;
    const started = performance.now();
    if (view === null || (changed.view && view.of !== changed.view)) {
      view = changed.view === "gone" ? makeGone() : make();
      view.of = changed.view;
      main.replaceChildren(view.node);
    }
    setText(trouble, state.trouble || "");
    trouble.hidden = !state.trouble;
    view.update(state, changed);
    stalls = tellStalls(state, stalls);
    const title = view.title(state);
    setText(document.querySelector("title"), `${state.stalled ? `✗ ${state.stalled} stalled, ` : ""}${title} - kickcall`);
    const steps = view.crumbs(state).map(([text, href]) => (href ? h("a", { href }, text) : h("span", {}, text)));
    const shown = steps.map((step) => step.outerHTML).join();
    if (crumbs.dataset.shown !== shown) {
      crumbs.dataset.shown = shown;
      crumbs.replaceChildren(...steps.flatMap((step) => [" / ", step]));
    }
    const spent = performance.now() - started;
    window.kickcallFrames = { count: (window.kickcallFrames?.count || 0) + 1, last: spent, most: Math.max(window.kickcallFrames?.most || 0, spent) };
  }

  mine.addEventListener("hello", (event) => {
    mayInject = JSON.parse(event.data).inject;
    // A stream that comes back begins anew.
    state = {};
    view = null;
    link.className = "state live";
    setText(link, "live");
  });
  mine.addEventListener("frame", (event) => {
    const changed = JSON.parse(event.data);
    if (changed.view && changed.view !== state.view) state = {};
    merge(state, changed);
    if (pending) {
      // Nobody saw the last one: draw both at once.
      const both = { ...pending, ...changed };
      for (const key of ["machines", "queues"]) {
        if (pending[key] instanceof Object && changed[key] instanceof Object) both[key] = { ...pending[key], ...changed[key] };
      }
      pending = both;
      return;
    }
    pending = changed;
    if (document.hidden) setTimeout(draw, 0);
    else requestAnimationFrame(draw);
  });
  mine.addEventListener("error", () => {
    link.className = "state lost";
    setText(link, "no connection, trying again");
    // A browser does not come back by itself to a server that was too busy.
    if (mine.readyState === EventSource.CLOSED) setTimeout(() => stream === mine && show(), 3000);
  });
}

document.addEventListener("click", (event) => {
  const anchor = event.target.closest("a[href]");
  if (!anchor || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey) return;
  const target = new URL(anchor.href);
  if (target.origin !== location.origin || target.hash || anchor.classList.contains("skip")) return;
  event.preventDefault();
  history.pushState(null, "", target);
  show();
  main.focus();
  scrollTo(0, 0);
});
window.addEventListener("popstate", show);

const theme = document.getElementById("theme");
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  setText(theme, name === "dark" ? "Light" : "Dark");
  theme.setAttribute("aria-label", `Switch to ${name === "dark" ? "light" : "dark"} colours`);
}
let chosen = null;
try {
  chosen = localStorage.getItem("kickcall-theme");
} catch {
  // No storage: it follows the system.
}
setTheme(chosen || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
theme.addEventListener("click", () => {
  const name = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  setTheme(name);
  try {
    localStorage.setItem("kickcall-theme", name);
  } catch {
    // It holds for this page.
  }
});
show();
