// Judging corrections: one text at a time, by keyboard; corrections of the same text are judged together.

import { ago, call, count, h, percent, show } from "./dom.js";

const at = (id) => document.getElementById(id);
const FEW = 8;
const MAX_SNIPPETS = 9;

let groups = [];
let place = 0;
let labels = [];
let isChanging = false;
let isBusy = false;
let isComplete = false;
let judgedHere = 0;
const done = []; // decisions that can be undone: [{id, seen}], one list for each group

// --- the queue ---

async function load(fresh = false) {
  if (fresh) {
    groups = [];
    place = 0;
    isComplete = false;
  }
  const query = new URLSearchParams({ state: at("state").value, edge: at("edge").value, after: fresh || !groups.length ? 0 : groups.at(-1).position });
  const answer = await call("GET", `/api/v1/reviews?${query}`);
  const known = new Set(groups.map((group) => group.position));
  groups.push(...answer.groups.filter((group) => !known.has(group.position)));
  isComplete = !answer.groups.length;
  labels = answer.labels;
  drawCounts(answer.counts);
  drawEdges(answer.edges);
  draw();
}

function drawCounts(counts) {
  const judged = counts.accepted + counts.rejected;
  at("judged").max = Math.max(1, judged + counts.pending);
  at("judged").value = judged;
  const here = judgedHere ? ` · ${count(judgedHere)} by you now` : "";
  at("counts").textContent = `${count(counts.pending)} pending · ${count(counts.accepted)} accepted · ${count(counts.rejected)} rejected${here}`;
}

function drawEdges(edges) {
  const select = at("edge");
  const known = new Set([...select.options].map((option) => option.value));
  select.append(...edges.filter((edge) => !known.has(edge)).map((edge) => h("option", { value: edge }, edge)));
}

function refill() {
  if (!isComplete && groups.length - place < FEW) guarded(() => load());
}

// --- what is seen ---

function draw() {
  place = Math.max(0, Math.min(place, groups.length - 1));
  const group = groups[place];
  show(at("queue"), groups.slice(place, place + MAX_SNIPPETS).map((next, index) =>
    h("li", {}, h("button", { type: "button", class: index ? "quiet" : "quiet current", "data-place": place + index }, next.corrections[0].text.slice(0, 90)))));
  if (!group) return at("current").replaceChildren(nothing());
  at("current").replaceChildren(...card(group).filter(Boolean));
}

function nothing() {
  const words = { pending: ["Nothing waits for you.", "New corrections appear here as edges send them."], accepted: ["None is accepted yet.", ""], rejected: ["None is rejected.", ""] };
  const [title, more] = words[at("state").value];
  return h("div", { class: "nothing" }, h("h2", {}, title), h("p", { class: "muted" }, more));
}

function card(group) {
  const [first] = group.corrections;
  const wanted = [...new Set(group.corrections.map((correction) => correction.label))];
  return [
    h("div", { class: "row spread small muted" }, h("span", {}, `${first.edge} · ${ago(first.received)}${first.model ? ` · ${first.model.version}` : ""}`),
      group.corrections.length > 1 ? h("span", { class: "tag accent" }, `${group.corrections.length} corrections of this text`) : null),
    h("blockquote", { class: "text", tabindex: "0" }, first.text),
    h("div", { class: "pair said" },
      h("div", {}, h("h3", { class: "muted" }, "The edge said"), scores(first)),
      h("div", {}, h("h3", { class: "muted" }, group.corrections.length > 1 ? "People say" : "The person says"), group.corrections.map(opinion))),
    h("div", { class: "actions" },
      h("button", { type: "button", class: "good", disabled: wanted.length > 1, title: wanted.length > 1 ? "They do not agree: change to the right label" : "", "data-act": "accept" },
        "Accept ", h("span", { class: "strong" }, wanted.length > 1 ? "" : wanted[0]), " ", h("kbd", {}, "a")),
      h("button", { type: "button", "data-act": "change", "aria-expanded": String(isChanging) }, "Change ", h("kbd", {}, "c")),
      h("button", { type: "button", class: "bad", "data-act": "reject" }, "Reject ", h("kbd", {}, "r")),
      h("span", { class: "push row" }, h("button", { type: "button", class: "quiet", "data-act": "undo", disabled: !done.length }, "Undo ", h("kbd", {}, "u")))),
    isChanging ? h("div", { class: "labels", role: "group", "aria-label": "Change to" }, labels.map((label, index) =>
      h("button", { type: "button", "data-label": label }, index < 9 ? [h("kbd", {}, String(index + 1)), " "] : null, label))) : null,
  ];
}

function opinion(correction) {
  const judged = correction.final_label ? h("span", { class: "tag good" }, correction.final_label) : correction.state === "rejected" ? h("span", { class: "tag bad" }, "rejected") : null;
  return h("div", { class: "opinion" }, h("p", { class: "flush" }, h("span", { class: "verdict" }, correction.label), " ", judged),
    correction.note ? h("p", { class: "flush" }, `“${correction.note}”`) : null,
    correction.reviewer ? h("p", { class: "small muted flush" }, `${correction.reviewer}, ${ago(correction.reviewed)}`) : null);
}

function scores(correction) {
  const best = Object.entries(correction.scores).sort(([, one], [, other]) => other - one).slice(0, 5);
  if (!best.length) return h("p", { class: "verdict" }, correction.predicted || "nothing: the text was given by itself");
  return h("dl", { class: "scores" }, best.map(([label, score]) => [
    h("dt", { class: label === correction.predicted ? "verdict" : "" }, label),
    h("dd", {}, h("progress", { max: 1, value: score, "aria-label": `${label} ${percent(score, 0)}` }), h("span", { class: "number" }, percent(score, 1)))]));
}

// --- decisions ---

async function decide(makeDecision, words) {
  const group = groups[place];
  if (!group || isBusy) return;
  const reviewer = at("reviewer").value.trim();
  if (!reviewer) {
    at("reviewer").focus();
    return toast("Say who you are first: each decision keeps who made it.", "warn");
  }
  const decisions = group.corrections.map((correction) => ({ id: correction.id, seen: correction.review, ...makeDecision(correction) }));
  const receipt = await send(reviewer, decisions);
  if (!receipt) return;
  groups.splice(place, 1);
  isChanging = false;
  if (receipt.applied.length) done.push(receipt.applied.map((applied) => ({ id: applied.id, seen: applied.review })));
  judgedHere += receipt.applied.length;
  if (receipt.refused.length) toast(receipt.refused.map((refused) => refused.reason).join("; "), "warn");
  else toast(words, "good");
  draw();
  await refresh();
}

async function undo() {
  const last = done.at(-1);
  if (!last || isBusy) return;
  const receipt = await send(at("reviewer").value.trim() || "a reviewer", last.map((decision) => ({ ...decision, decision: "undo" })));
  if (!receipt) return;
  done.pop();
  judgedHere = Math.max(0, judgedHere - receipt.applied.length);
  toast(receipt.refused.length ? receipt.refused.map((refused) => refused.reason).join("; ") : "Undone: it is pending again.", receipt.refused.length ? "warn" : "good");
  isChanging = false;
  await guarded(() => load(true));
}

async function send(reviewer, decisions) {
  isBusy = true;
  try {
    return await guarded(() => call("POST", "/api/v1/reviews", { reviewer, decisions }));
  } finally {
    isBusy = false;
  }
}

async function refresh() {
  await guarded(async () => drawCounts((await call("GET", "/api/v1/reviews?limit=1")).counts));
  refill();
}

const accept = () => {
  const group = groups[place];
  if (!group || new Set(group.corrections.map((correction) => correction.label)).size > 1) return;
  decide(() => ({ decision: "accept" }), `Accepted as ${group.corrections[0].label}.`);
};
const changeTo = (label) => label && decide((correction) => (correction.label === label ? { decision: "accept" } : { decision: "change", label }), `Accepted as ${label}.`);
const reject = () => decide(() => ({ decision: "reject" }), "Rejected.");
const toggleChange = () => { isChanging = !isChanging; draw(); };
const step = (by) => { place += by; isChanging = false; draw(); refill(); };

// --- hands ---

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  if (isChanging && /^[1-9]$/.test(event.key)) return changeTo(labels[Number(event.key) - 1]);
  const keys = { a: accept, c: toggleChange, r: reject, u: undo, j: () => step(1), k: () => step(-1), Escape: () => isChanging && toggleChange() };
  if (keys[event.key]) {
    event.preventDefault();
    keys[event.key]();
  }
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.place) { place = Number(button.dataset.place); isChanging = false; draw(); }
  if (button.dataset.label) changeTo(button.dataset.label);
  const acts = { accept, change: toggleChange, reject, undo };
  acts[button.dataset.act]?.();
});

let hiding;
function toast(words, kind) {
  const box = at("toast");
  box.textContent = words;
  box.className = `toast notice ${kind}`;
  box.hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => { box.hidden = true; }, 4000);
}

async function guarded(work) {
  try {
    const result = await work();
    at("trouble").hidden = true;
    return result;
  } catch (error) {
    at("trouble").textContent = error.message;
    at("trouble").hidden = false;
    return undefined;
  }
}

at("reviewer").value = localStorage.getItem("reviewer") || "";
at("reviewer").addEventListener("change", () => localStorage.setItem("reviewer", at("reviewer").value.trim()));
for (const filter of ["state", "edge"]) at(filter).addEventListener("change", () => guarded(() => load(true)));
guarded(() => load(true));
setInterval(() => { if (!document.hidden && !isBusy && groups.length < FEW) guarded(() => load(!groups.length)); }, 3000);
