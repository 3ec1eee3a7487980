// What happened, and when: stalls as bars, injections as marks, and the same as a list.
import { h } from "./dom.js";

const RANGES = [
  ["10 min", 600],
  ["1 h", 3600],
  ["1 day", 86400],
];
const LANES = 12;
const LISTED = 40;

const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hour12: false });

function describe(one) {
  const where = `${one.machine} ${one.device} queue ${one.queue}`;
  return `${clock(one.at)}  ${where}: ${one.what}: ${one.outcome}${one.stall ? "" : `, by ${one.by}`}`;
}

export function makeTimeline() {
  const track = h("div", { class: "line", "aria-hidden": "true" });
  const from = h("span", {});
  const axis = h("div", { class: "axis" }, from, h("span", {}, "now"));
  const list = h("ol", { class: "moments" });
  const problem = h("p", { class: "note" });
  let range = RANGES[0][1];
  let latest = null;
  let drawnAt = 0;
  const buttons = RANGES.map(([name, seconds]) =>
    h("button", { type: "button", "aria-pressed": String(seconds === range), onclick: () => choose(seconds) }, name),
  );
  const node = h("section", { "aria-label": "Time line" }, h("h2", {}, "Time line"), h("div", { class: "bar" }, ...buttons), axis, track, list, problem);

  function choose(seconds) {
    range = seconds;
    buttons.forEach((button, place) => button.setAttribute("aria-pressed", String(RANGES[place][1] === seconds)));
    draw();
  }

  function draw() {
    if (!latest) return;
    drawnAt = Date.now();
    const now = drawnAt / 1000;
    const since = now - range;
    const moments = latest.moments.filter((one) => (one.until ?? (one.stall ? now : one.at)) >= since);
    const place = (at) => `${Math.min(100, Math.max(0, ((at - since) / range) * 100)).toFixed(2)}%`;
    const lanes = new Map();
    for (const one of [...moments].reverse()) {
      const who = `${one.machine} ${one.device}:${one.queue}`;
      if (!lanes.has(who) && lanes.size < LANES) lanes.set(who, []);
      lanes.get(who)?.push(one);
    }
    const rows = [];
    for (const [who, those] of lanes) {
      const row = h("div", { class: "track" });
      for (const one of those) {
        const mark = one.stall ? h("i", { class: one.tone, title: describe(one) }) : h("b", { class: one.tone, title: describe(one) }, "▲");
        mark.style.left = place(one.at);
        if (one.stall) mark.style.right = `calc(100% - ${place(one.until ?? now)})`;
        row.append(mark);
      }
      rows.push(h("div", { class: "who" }, who), row);
    }
    track.replaceChildren(...rows);
    axis.hidden = !rows.length;
    from.textContent = clock(since);
    list.replaceChildren(
      ...moments
        .slice(-LISTED)
        .reverse()
        .map((one) => h("li", {}, h("span", { class: one.tone }, one.stall ? (one.until ? "■ " : "✗ ") : "▲ "), describe(one))),
    );
    if (!moments.length) list.replaceChildren(h("li", { class: "note" }, "Nothing happened in this time."));
    problem.textContent = latest.problem ? `Only what this page's server saw: ${latest.problem}.` : "";
  }

  return {
    node,
    update(state, changed, mine) {
      if (!changed.moments && Date.now() - drawnAt < 2000) return;
      latest = { moments: (state.moments || []).filter(mine), problem: state.problem };
      draw();
    },
  };
}
