// The ring of a queue, as kickcall.draw.svg draws it: the server says where the arcs are.
import { s, setAttribute, setText } from "./dom.js";

const PARTS = ["reap", "device", "outstanding", "fetch"];

export function makeRing(inbox) {
  const circle = { cx: 60, cy: 60, r: 43 };
  const arcs = Object.fromEntries(
    PARTS.map((part) => [
      part,
      s("circle", { ...circle, class: `arc ${part}`, pathLength: 100, "stroke-dasharray": "0 100" }),
    ]),
  );
  const turned = s("g", { transform: "rotate(-90 60 60)" }, ...Object.values(arcs));
  const head = s("path", { class: "head", d: "M60 9 54 0 66 0Z" });
  const number = s("text", { class: "number", x: 60, y: 66 });
  const unit = s("text", { class: "unit", x: 60, y: 80 });
  unit.textContent = inbox ? "buffers" : "outstanding";
  const node = s(
    "svg",
    { class: inbox ? "kc inbox" : "kc", viewBox: "0 0 120 120", role: "img" },
    s("circle", { ...circle, class: "track" }),
    turned,
    head,
    number,
    unit,
  );
  let shown = "";
  return {
    node,
    update(ring) {
      const wanted = JSON.stringify(ring);
      if (wanted === shown) return;
      shown = wanted;
      setAttribute(node, "aria-label", `The ring: ${ring.told}`);
      const there = new Map(ring.arcs.map(([part, start, length]) => [part, [start, length]]));
      for (const part of PARTS) {
        const [start, length] = there.get(part) || [0, 0];
        setAttribute(arcs[part], "visibility", length ? "visible" : "hidden");
        setAttribute(arcs[part], "stroke-dasharray", `${length} 100`);
        setAttribute(arcs[part], "stroke-dashoffset", -start);
      }
      setAttribute(head, "transform", `rotate(${(ring.head * 3.6).toFixed(1)} 60 60)`);
      setText(number, ring.problem ? "?" : ring.out);
    },
  };
}
