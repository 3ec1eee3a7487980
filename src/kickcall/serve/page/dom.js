// How are elements made? Texts become text nodes, never markup.
const SVG = "http://www.w3.org/2000/svg";

function make(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const h = (tag, attributes, ...children) =>
  make(document.createElement(tag), attributes, children);

export const s = (tag, attributes, ...children) =>
  make(document.createElementNS(SVG, tag), attributes, children);

// A drawing that the server made of escaped text; it is parsed as XML, where nothing ever runs.
export function drawing(text) {
  const root = new DOMParser().parseFromString(text, "image/svg+xml").documentElement;
  return document.importNode(root, true);
}

export function setText(node, text) {
  if (node.textContent !== String(text)) node.textContent = text;
}

export function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

// Puts nodes in that order; what has the focus keeps it.
export function arrange(parent, nodes) {
  const there = parent.children;
  if (nodes.length === there.length && nodes.every((one, place) => one === there[place])) return;
  const focused = document.activeElement;
  parent.replaceChildren(...nodes);
  if (focused !== document.activeElement && parent.contains(focused)) focused.focus({ preventScroll: true });
}

export function verdictText(verdict, hop) {
  return `${verdict.mark} ${verdict.word}${hop ? ` on hop ${hop}` : ""}`;
}

export function setVerdict(node, verdict, hop) {
  setText(node, verdictText(verdict, hop));
  setAttribute(node, "class", `verdict ${verdict.tone}`);
}

export const machineLink = (link) => `/machine?name=${encodeURIComponent(link)}`;

export const queueLink = (link, device, queue) =>
  `/queue?name=${encodeURIComponent(link)}&device=${encodeURIComponent(device)}&queue=${queue}`;
