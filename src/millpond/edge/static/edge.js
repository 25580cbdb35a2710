// The edge's page: ask, judge, watch. All text from outside goes in as textContent, never as markup.
"use strict";

const LOOK_MS = 2000;
const byId = (id) => document.getElementById(id);
let prediction = null;

class Trouble extends Error {}

async function call(path, body, headers = {}) {
  let response;
  try {
    response = await fetch(path, body === undefined ? {} : {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers },
      body: JSON.stringify(body),
    });
  } catch {
    throw new Trouble("The edge does not answer. Try again in a moment.");
  }
  if (response.status === 401) {
    location.assign(`/login?next=${encodeURIComponent(location.pathname)}`);
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) {
    const error = answer.error ?? { message: `The edge answered ${response.status}.`, next: "Try again." };
    throw new Trouble(`${error.message} ${error.next}`);
  }
  return answer;
}

function show(element, text) {
  element.textContent = text ?? "";
  element.hidden = !text;
}

function create(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function percent(share) {
  if (share > 0.9995 && share < 1) return "> 99.9 %";
  if (share < 0.0005 && share > 0) return "< 0.1 %";
  return `${(100 * share).toFixed(1)} %`;
}

function ago(time) {
  const seconds = Math.max(0, Math.round((Date.now() - Date.parse(time)) / 1000));
  if (seconds < 5) return "just now";
  if (seconds < 90) return `${seconds} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}

// --- ask ------------------------------------------------------------------------------------------------------------

async function ask(event) {
  event?.preventDefault();
  const text = byId("text").value;
  show(byId("trouble"));
  if (!text.trim()) {
    show(byId("trouble"), "Type a text first.");
    byId("text").focus();
    return;
  }
  byId("ask").disabled = true;
  try {
    showAnswer(await call("/v1/predict", { text }));
  } catch (error) {
    byId("answer").hidden = true;
    show(byId("trouble"), error.message);
  } finally {
    byId("ask").disabled = false;
  }
}

function showAnswer(answer) {
  prediction = answer;
  byId("verdict").textContent = answer.label;
  byId("answered-by").textContent = `${answer.model.name} ${answer.model.version}`;
  const ranked = Object.entries(answer.scores).sort((one, other) => other[1] - one[1]);
  byId("scores").replaceChildren(...ranked.map(([label, share], rank) => {
    const item = create("li");
    const bar = create("div", rank ? "bar" : "bar best");
    const fill = create("span");
    bar.append(fill);
    item.append(create("span", rank ? "name" : "name best", label), create("span", "share", percent(share)), bar);
    requestAnimationFrame(() => requestAnimationFrame(() => { fill.style.width = `${100 * share}%`; }));
    return item;
  }));
  const others = Object.keys(answer.scores).filter((label) => label !== answer.label);
  byId("labels").replaceChildren(...others.map((label) => {
    const choice = create("label");
    const input = create("input");
    Object.assign(input, { type: "radio", name: "label", value: label, required: true, checked: others.length === 1 });
    choice.append(input, label);
    return choice;
  }));
  byId("note").value = "";
  openCorrection(false);
  show(byId("thanks"));
  byId("ask-back").hidden = false;
  byId("answer").hidden = false;
}

// --- judge ----------------------------------------------------------------------------------------------------------

function openCorrection(open) {
  byId("correct").hidden = !open;
  byId("wrong").setAttribute("aria-expanded", String(open));
  if (open) byId("labels").querySelector("input")?.focus();
}

async function judge(label, note) {
  show(byId("trouble"));
  try {
    await call("/v1/feedback", { id: prediction.id, label, note });
  } catch (error) {
    show(byId("trouble"), error.message);
    byId("trouble").scrollIntoView({ block: "nearest" });
    return;
  }
  byId("ask-back").hidden = true;
  const kept = "It is on this edge's disk, and goes to the hub as soon as the hub can be reached.";
  show(byId("thanks"), label === prediction.label ? `Thank you: “${label}” is confirmed. ${kept}` : `Thank you: it should have been “${label}”. ${kept}`);
  look();
}

// --- watch ----------------------------------------------------------------------------------------------------------

async function look() {
  try {
    const [model, feedback] = await Promise.all([call("/v1/model"), call("/v1/feedback?limit=8")]);
    showModel(model);
    showFeedback(feedback.corrections);
  } catch (error) {
    show(byId("sync-trouble"), error.message);
  }
}

function showModel({ serving, refused, previous, pinned, sync }) {
  byId("version").textContent = serving ? `${serving.name} ${serving.version}` : "none yet";
  byId("version").title = serving?.digest ?? "";
  const accuracy = serving?.metrics.test_accuracy;
  byId("accuracy").textContent = accuracy === undefined ? "–" : percent(accuracy);
  byId("created").textContent = serving?.created ? ago(serving.created) : "–";
  byId("previous").textContent = previous.map((model) => model.version).join(", ") || "–";
  byId("contact").textContent = !sync.hub ? "no hub is set" : sync.last_contact ? ago(sync.last_contact) : "never";
  byId("waiting").textContent = sync.outbox;
  byId("set-aside").textContent = sync.set_aside;
  show(byId("refused"), refused && `The hub's newest model${refused.version ? ` (${refused.version})` : ""} was refused ${ago(refused.at)}, and the one before it goes on. ${refused.reason}`);
  const errors = [...new Set(Object.values(sync.errors))];
  show(byId("sync-trouble"), errors.join(" ") || (pinned && "Rolled back: the hub's present champion is held off until the hub names another."));
}

const STATES = { waiting: ["warn", "waiting for the hub"], stored: ["good", "the hub has it"], refused: ["bad", "refused by the hub"] };

function showFeedback(corrections) {
  byId("none").hidden = corrections.length > 0;
  byId("recent").replaceChildren(...corrections.map((correction) => {
    const item = create("li");
    const head = create("div", "row spread");
    const said = create("span");
    if (correction.predicted === correction.label) {
      said.append(create("span", "strong", correction.label), " confirmed");
    } else {
      if (correction.predicted) said.append(create("span", "muted", `${correction.predicted} → `));
      said.append(create("span", "strong", correction.label));
    }
    const [kind, words] = STATES[correction.state];
    head.append(said, create("span", `tag ${kind}`, words));
    item.append(head, create("p", "text small", correction.text));
    const more = [ago(correction.created), correction.note && `“${correction.note}”`, correction.reason].filter(Boolean);
    item.append(create("span", "muted small", more.join(" · ")));
    return item;
  }));
}

// --- wiring ---------------------------------------------------------------------------------------------------------

byId("try").addEventListener("submit", ask);
byId("right").addEventListener("click", () => judge(prediction.label, ""));
byId("wrong").addEventListener("click", () => openCorrection(byId("correct").hidden));
byId("correct").addEventListener("submit", (event) => {
  event.preventDefault();
  judge(new FormData(event.target).get("label"), byId("note").value);
});
byId("correct").querySelector("fieldset").setAttribute("role", "radiogroup");
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    ask(event);
  } else if (!event.target.matches("input, textarea, select") && !event.ctrlKey && !event.metaKey && !event.altKey) {
    if (byId("answer").hidden || byId("ask-back").hidden) return;
    if (event.key === "r") byId("right").click();
    if (event.key === "w") byId("wrong").click();
  }
});
byId("text").addEventListener("input", () => {
  const bytes = new TextEncoder().encode(byId("text").value).length;
  byId("length").textContent = `${bytes.toLocaleString("en")} bytes`;
});
setInterval(() => { if (!document.hidden) look(); }, LOOK_MS);
look();
