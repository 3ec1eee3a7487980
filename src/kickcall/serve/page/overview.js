// All machines, and the worst of all queues.
import { arrange, h, machineLink, queueLink, setAttribute, setText, setVerdict, verdictText } from "./dom.js";
import { makeTimeline } from "./timeline.js";

const COLUMNS = [
  ["verdict", ""],
  ["machine", ""],
  ["state", "less"],
  ["queues", "number less"],
  ["stalled", "number"],
  ["outstanding", "number less"],
  ["requests/s", "number less"],
  ["done/s", "number"],
];

function makeRow() {
  const cells = COLUMNS.map(([, css]) => h("td", { class: css }));
  const verdict = h("span", {});
  const link = h("a", {});
  cells[0].append(verdict);
  cells[1].append(link);
  cells[1].setAttribute("class", "name");
  const node = h("tr", {}, ...cells);
  return {
    node,
    update(one) {
      setVerdict(verdict, one.verdict, 0);
      setText(link, one.name);
      setAttribute(link, "href", machineLink(one.link));
      setAttribute(link, "title", `pid ${one.pid}`);
      setText(cells[2], one.why ? `${one.state}: ${one.why}` : one.state);
      setText(cells[3], one.queues);
      setText(cells[4], one.stalled);
      setAttribute(cells[4], "class", one.stalled ? "number bad" : "number");
      setText(cells[5], one.out);
      setText(cells[6], one.requests);
      setText(cells[7], one.completions);
    },
  };
}

function makeCard() {
  const verdict = h("strong", { class: "verdict bad" });
  const where = h("span", {});
  const link = h("a", { class: "card bad-card" }, verdict, where);
  return {
    node: h("li", {}, link),
    update(one) {
      setAttribute(link, "href", queueLink(one.link, one.device, one.queue));
      setText(verdict, verdictText(one.verdict, one.hop));
      setText(where, `${one.machine} ${one.name} queue ${one.queue}, for ${one.for}`);
    },
  };
}

export function makeOverview() {
  const title = h("h1", {}, "Machines");
  const count = h("p", { class: "note" });
  const worst = h("ul", { class: "tiles", "aria-label": "Stalled queues" });
  const stalled = h("section", { hidden: "" }, h("h2", {}, "Stalled now, longest first"), worst);
  const filter = h("input", { type: "search", placeholder: "Filter machines", "aria-label": "Filter machines" });
  const head = h("tr", {}, ...COLUMNS.map(([name, css]) => h("th", { class: css, scope: "col" }, name)));
  const body = h("tbody", {});
  const timeline = makeTimeline();
  const node = h(
    "div",
    {},
    title,
    count,
    stalled,
    h("div", { class: "bar" }, filter),
    h("div", { class: "wide" }, h("table", {}, h("thead", {}, head), body)),
    timeline.node,
  );
  const rows = new Map();
  const cards = new Map();

  function sift(machines) {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const [key, row] of rows) {
      const one = machines[key];
      const text = `${one.name} ${one.verdict.word} ${one.state}`.toLowerCase();
      row.node.hidden = !words.every((word) => text.includes(word));
    }
  }
  let latest = {};
  filter.addEventListener("input", () => sift(latest));

  return {
    node,
    title: () => "Machines",
    crumbs: () => [],
    update(state, changed) {
      latest = state.machines;
      for (const key of changed.machines_gone || []) {
        rows.get(key)?.node.remove();
        rows.delete(key);
      }
      const touched = Object.keys(changed.machines || {});
      for (const key of touched) {
        if (!rows.has(key)) rows.set(key, makeRow());
        rows.get(key).update(state.machines[key]);
      }
      if (touched.length || changed.machines_gone) {
        const keys = [...rows.keys()].sort((a, b) => {
          const [one, other] = [state.machines[a], state.machines[b]];
          return (
            Math.max(other.rank, 1) - Math.max(one.rank, 1) ||
            other.stalled - one.stalled ||
            one.name.localeCompare(other.name, undefined, { numeric: true })
          );
        });
        arrange(body, keys.map((key) => rows.get(key).node));
        sift(state.machines);
      }
      const number = Object.keys(state.machines).length;
      setText(count, `${number} ${number === 1 ? "machine" : "machines"}, ${state.queues} queues, ${state.stalled || "none"} stalled`);
      if (!number) setText(count, "No QEMU runs here, or none that was asked for.");
      // In place, so that whoever has come to a card by keyboard stays there.
      const there = new Map(state.worst.map((one) => [one.key, one]));
      for (const key of cards.keys()) if (!there.has(key)) cards.delete(key);
      for (const [key, one] of there) {
        if (!cards.has(key)) cards.set(key, makeCard());
        cards.get(key).update(one);
      }
      stalled.hidden = !there.size;
      const nodes = [...there.keys()].map((key) => cards.get(key).node);
      arrange(worst, nodes);
      timeline.update(state, changed, () => true);
    },
  };
}
