// Raising an event: the token, what will be written, a yes, and what came of it.
import { h } from "./dom.js";

let token = "";

async function post(body) {
  const answer = await fetch("/inject", {
    method: "POST",
    headers: { "content-type": "application/json", "x-kickcall-token": token },
    body: JSON.stringify(body),
    credentials: "omit",
  });
  const said = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(said.error), { status: answer.status });
  return said;
}

function ask(title, content, yes, no) {
  const dialog = document.getElementById("dialog");
  return new Promise((resolve) => {
    const form = h("form", { id: "asked" }, ...content);
    const submit = h("button", { type: "submit", class: "main", id: "yes" }, yes);
    const leave = h("button", { type: "button", id: "no", onclick: () => dialog.close("no") }, no);
    form.append(h("div", { class: "bar" }, submit, leave));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      dialog.close("yes");
    });
    dialog.replaceChildren(h("h2", { id: "dialog-title" }, title), form);
    dialog.returnValue = "no";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
    dialog.showModal();
    (form.querySelector("input") || leave).focus();
  });
}

async function askForToken(why) {
  const input = h("input", { type: "password", autocomplete: "off", id: "token", required: "" });
  const label = h("label", {}, "The token that kickcall serve printed when it was started", input);
  if (!(await ask("Who are you?", [why ? h("p", { class: "bad" }, why) : null, label], "Go on", "Leave it"))) return false;
  // A header holds nothing else; what is left out would not fit the token anyway.
  token = input.value.replace(/[^\x21-\x7e]/g, "");
  return true;
}

function counters(of) {
  return `count ${of.count ?? "-"}, avail.idx ${of.avail ?? "-"}, used.idx ${of.used ?? "-"}`;
}

export async function askToInject(which, event, said) {
  const body = { ...which, queue: Number(which.queue), event };
  let why = "";
  try {
    for (;;) {
      if ((!token || why) && !(await askForToken(why))) return;
      try {
        said.textContent = "asking what would be written …";
        var plan = await post({ ...body, dry_run: true });
        break;
      } catch (error) {
        if (error.status !== 403) throw error;
        why = error.message;
      }
    }
    const does = event === "kick" ? "The device will look at what the driver published." : "The driver will look at what the device completed.";
    const written = plan.via === "eventfd" ? `1 will be written into ${plan.target}.` : `Will be written, via ${plan.via}: ${plan.target}.`;
    const go = await ask(
      `${event === "kick" ? "Kick" : "Call"} ${plan.device} queue ${plan.queue} on ${plan.machine}?`,
      [h("p", { id: "plan" }, written), h("p", { class: "note mono" }, `now: ${counters(plan.before)}`), h("p", {}, does)],
      "Write it",
      "Leave it",
    );
    if (!go) {
      said.textContent = "Nothing was written.";
      return;
    }
    const done = await post({ ...body, dry_run: false });
    const moved = done.before.used !== done.after.used || done.before.avail !== done.after.avail;
    said.textContent = `${event === "kick" ? "Kicked" : "Called"} via ${done.via}. ${counters(done.before)} → ${counters(done.after)}${moved ? ": the queue moved." : "."}`;
  } catch (error) {
    said.textContent = `Nothing was written: ${error.message}`;
  }
}
