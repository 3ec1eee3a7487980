// One machine: its devices as lanes, each queue's ring in them.
import { h, queueLink, setAttribute, setText, setVerdict, verdictText } from "./dom.js";
import { makeRing } from "./ring.js";
import { makeTimeline } from "./timeline.js";

function makeQueue(link, one) {
  const ring = makeRing(one.inbox);
  const verdict = h("span", {});
  const rates = h("p", { class: "note" });
  const waits = h("p", { class: "note" });
  const node = h(
    "a",
    { class: "queue", href: queueLink(link, one.device, one.queue) },
    ring.node,
    h("strong", {}, `queue ${one.queue}`),
    verdict,
    rates,
    waits,
  );
  return {
    node: h("li", {}, node),
    update(now) {
      setAttribute(node, "class", now.verdict.tone === "bad" ? "queue stalled" : "queue");
      setVerdict(verdict, now.verdict, now.hop);
      setText(rates, `${now.requests} req/s, ${now.completions} done/s`);
      setText(waits, now.age === "-" ? (now.inbox ? "buffers wait: normal" : "nothing waits") : `oldest waits ${now.age}`);
      ring.update(now.ring);
    },
  };
}

export const legend = () =>
  h(
    "ul",
    { class: "legend", "aria-label": "The ring" },
    h("li", {}, h("i", { class: "fetch" }), "published, to be fetched (thick)"),
    h("li", {}, h("i", { class: "device" }), "fetched, in the device"),
    h("li", {}, h("i", { class: "reap" }), "completed, to be reaped (thin)"),
    h("li", {}, "▼ where the driver publishes next; the ring runs clockwise"),
  );

export function makeMachine(link) {
  const title = h("h1", {});
  const about = h("p", { class: "note" });
  const lanes = h("div", { class: "lanes" });
  const worst = h("ul", { class: "tiles worst", "aria-label": "Stalled queues", hidden: "" });
  const timeline = makeTimeline();
  const node = h("div", {}, title, about, worst, lanes, legend(), timeline.node);
  let queues = new Map();
  let drawn = "";
  let cards = "";
  function showWorst(state) {
    const stalled = Object.values(state.queues).filter((one) => one.verdict.tone === "bad");
    const wanted = JSON.stringify(stalled.map((one) => [one.device, one.queue, one.verdict, one.hop]));
    if (wanted === cards) return;
    cards = wanted;
    worst.hidden = !stalled.length;
    const names = new Map(state.devices.map((one) => [one.device, one.name]));
    worst.replaceChildren(
      ...stalled.map((one) =>
        h("li", {}, h("a", { class: "card bad-card", href: queueLink(link, one.device, one.queue) }, h("strong", { class: "verdict bad" }, verdictText(one.verdict, one.hop)), `${names.get(one.device)} queue ${one.queue}`)),
      ),
    );
  }
  return {
    node,
    title: (state) => state.name,
    crumbs: (state) => [[state.name, null]],
    update(state, changed) {
      setText(title, state.name);
      setText(about, `pid ${state.pid}, QEMU ${state.version || "of unknown version"}, ${state.state}${state.why ? `: ${state.why}` : ""}`);
      const shape = JSON.stringify([state.devices, Object.keys(state.queues)]);
      let touched = Object.keys(changed.queues || {});
      if (shape !== drawn) {
        drawn = shape;
        queues = new Map();
        lanes.replaceChildren(
          ...state.devices.map((device) => {
            const list = h("ul", { class: "queues" });
            for (const [key, one] of Object.entries(state.queues)) {
              if (one.device !== device.device) continue;
              const tile = makeQueue(link, one);
              queues.set(key, tile);
              list.append(tile.node);
            }
            const heading = h("h2", {}, device.name, " ", h("span", {}, `${device.kind}, ${device.backend}`));
            const why = h("p", { class: "note" });
            if (device.verdict) {
              const verdict = h("span", {});
              setVerdict(verdict, device.verdict, 0);
              why.append(verdict, ` ${device.why}`);
            }
            return h("section", { class: "lane" }, heading, device.verdict ? why : null, list);
          }),
        );
        touched = Object.keys(state.queues);
      }
      for (const key of touched) queues.get(key)?.update(state.queues[key]);
      showWorst(state);
      timeline.update(state, changed, (one) => one.machine === state.name);
    },
  };
}
