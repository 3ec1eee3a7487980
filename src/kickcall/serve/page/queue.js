// One queue: the path with its break, the ring, the evidence, and what can be done.
import { drawing, h, machineLink, s, setAttribute, setText, setVerdict } from "./dom.js";
import { askToInject } from "./inject.js";
import { legend } from "./machine.js";
import { makeRing } from "./ring.js";
import { makeTimeline } from "./timeline.js";

const PLACES = 60;

function makeSpark(name) {
  const line = s("polyline", {});
  const node = s("svg", { class: "spark", viewBox: "0 0 300 46", preserveAspectRatio: "none", role: "img" }, line);
  return {
    node,
    update(values, unit) {
      const most = Math.max(...values, 1e-9);
      const points = values.map((value, place) => {
        const x = 300 - (values.length - 1 - place) * (300 / (PLACES - 1));
        return `${x.toFixed(1)},${(44 - (value / most) * 42).toFixed(1)}`;
      });
      setAttribute(line, "points", points.join(" "));
      const now = values.length ? values[values.length - 1] : 0;
      setAttribute(node, "aria-label", `${name}: ${now} ${unit}, at most ${Math.max(...values, 0)} in the last half minute`);
    },
  };
}

function pairs(rows) {
  return rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", { class: "mono" }, value)]);
}

export function makeQueueView(link, device, queue, app) {
  const title = h("h1", {});
  const headline = h("strong", {});
  const lasting = h("span", { class: "note" });
  const because = h("p", {});
  const flat = h("div", { class: "flat" });
  const tall = h("div", { class: "tall" });
  const next = h("p", { class: "next", hidden: "" });
  const positions = h("dl", {});
  const evidence = h("dl", {});
  const rates = h("dl", {});
  const works = makeSpark("Outstanding");
  const ages = makeSpark("Age of the oldest request");
  const ringbox = h("div", { class: "ringbox" });
  const said = h("p", { class: "note", role: "status", id: "said" });
  const button = (event) =>
    h("button", { type: "button", id: event, onclick: () => askToInject({ machine: link, device, queue }, event, said) }, event === "kick" ? "Kick …" : "Call …");
  const buttons = h("div", { class: "bar", hidden: "" }, button("kick"), button("call"), said);
  const timeline = makeTimeline();
  const node = h(
    "div",
    {},
    title,
    h("p", { class: "headline" }, headline, " ", lasting),
    because,
    h("div", { class: "path" }, flat, tall),
    next,
    buttons,
    h(
      "div",
      { class: "side" },
      h("section", { class: "panel" }, h("h2", {}, "Ring"), ringbox, legend()),
      h("section", { class: "panel" }, h("h2", {}, "Last half minute"), h("p", { class: "note" }, "outstanding"), works.node, h("p", { class: "note" }, "age of the oldest request"), ages.node, rates),
      h("section", { class: "panel" }, h("h2", {}, "Evidence"), evidence),
    ),
    timeline.node,
  );
  let ring = null;
  let drawn = ["", "", "", ""];
  return {
    node,
    title: (state) => `${state.machine} ${state.name} queue ${state.queue}`,
    crumbs: (state) => [[state.machine, machineLink(link)], [`${state.name} queue ${state.queue}`, null]],
    update(state, changed) {
      setText(title, `${state.name} queue ${state.queue}`);
      setVerdict(headline, state.verdict, state.hop);
      setText(lasting, state.lasting);
      setText(because, state.because);
      if (state.path !== drawn[0]) flat.replaceChildren(drawing(state.path));
      if (state.tall !== drawn[1]) tall.replaceChildren(drawing(state.tall));
      const shown = JSON.stringify(state.evidence);
      if (shown !== drawn[2]) evidence.replaceChildren(...pairs([...state.facts, ...state.evidence]));
      const places = JSON.stringify(state.positions);
      if (places !== drawn[3]) positions.replaceChildren(...pairs(state.positions));
      drawn = [state.path, state.tall, shown, places];
      next.hidden = state.verdict.tone !== "bad";
      setText(next, `Next: ${state.remedy}`);
      buttons.hidden = !app.mayInject();
      for (const event of ["kick", "call"]) {
        const wanted = state.event === event && state.verdict.tone === "bad";
        setAttribute(buttons.querySelector(`#${event}`), "class", wanted ? "main" : "");
      }
      if (!ring) {
        ring = makeRing(state.inbox);
        ringbox.append(ring.node, positions);
      }
      ring.update(state.ring);
      works.update(state.works, "entries");
      ages.update(state.ages, "seconds");
      setAttribute(ages.node, "class", `spark ${state.verdict.tone}`);
      rates.replaceChildren(
        ...pairs([
          ["requests/s", state.requests],
          ["completions/s", state.completions],
          ["kicks/s", state.not_counted ? "not counted" : state.kicks],
          ["calls/s", state.not_counted ? "not counted" : state.calls],
          ["oldest request", state.age],
        ]),
      );
      rates.title = state.not_counted;
      timeline.update(state, changed, (one) => one.machine === state.machine && one.device === state.name && one.queue === state.queue);
    },
  };
}
