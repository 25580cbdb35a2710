// The loop at a glance: asks the hub for its state every two seconds and shows it.

import { accuracyChart } from "./charts.js";
import { ago, call, count, h, percent, poll, show, span, when } from "./dom.js";
import { progressOf, stateTag } from "./training.js";

const at = (id) => document.getElementById(id);
let state;
let steps = [];

async function look() {
  state = await call("GET", "/api/v1/state");
  const running = state.jobs.find((job) => job.state === "running");
  steps = running ? (await call("GET", `/api/v1/jobs/${running.id}/progress`)).progress : [];
  draw();
  return isBusy();
}

const isBusy = () => state.jobs.some((job) => job.state === "queued" || job.state === "running");

function draw() {
  drawLoop();
  drawAccuracy();
  drawTraining();
  drawDecisions();
  drawEdges();
  at("retrain").disabled = isBusy() || Boolean(state.why_no_training);
  at("retrain").title = state.why_no_training || "";
  at("rollback").disabled = !state.can_roll_back;
}

function drawLoop() {
  const { champion, corrections, edges, jobs, promotions } = state;
  const current = edges.filter((edge) => champion && edge.report.serving?.digest === champion.digest).length;
  const waiting = edges.reduce((sum, edge) => sum + edge.report.outbox, 0);
  const job = jobs[0];
  const busy = isBusy();
  const decided = promotions[0];
  const verdict = !decided ? "–" : decided.kind === "rollback" ? "rolled back" : decided.promoted ? "promoted" : "refused";
  show(at("loop"),
    station("Edges", edges.length ? `${current} of ${count(edges.length)}` : "0",
      edges.length ? `serve the champion${waiting ? `, ${count(waiting)} corrections wait there` : ""}` : "none has reported yet", waiting > 0),
    station("Corrections", count(corrections.pending), h("a", { href: "/review" }, "to review"), corrections.pending > 0,
      ` · ${count(corrections.accepted)} accepted, ${count(corrections.rejected)} rejected`),
    station("Training", busy ? (job.progress ? job.progress.stage : job.state) : state.retrain_after ? `${count(state.accepted_since_training)} / ${count(state.retrain_after)}` : count(state.accepted_since_training),
      busy ? h("a", { href: `/jobs/${job.id}` }, `${job.id} makes ${job.version || "a model"}`) : state.retrain_after ? "accepted until it trains by itself" : "accepted since the last; trains by hand", busy),
    station("Decision", verdict, decided ? h("a", { href: `/promotions/${decided.id}` }, `${decided.version} ${ago(decided.at)}`) : "no candidate yet", false),
    station("Champion", champion ? champion.version : "none",
      champion ? `${percent(accuracyOf(champion.version) ?? champion.metrics.test_accuracy)} on the test split` : h("span", {}, "Train now makes the first"), false));
}

function station(name, figure, words, isNow, more = "") {
  return h("li", { class: isNow ? "card station now" : "card station" },
    h("h2", {}, isNow ? h("span", { class: "pulse" }) : null, name), h("p", { class: "figure" }, figure), h("p", { class: "small muted flush" }, words, more));
}

function accuracyOf(version) {
  return state.promotions.find((record) => record.version === version && record.test)?.test.candidate_accuracy;
}

function drawAccuracy() {
  const measured = state.promotions.filter((record) => record.test && record.test.candidate_accuracy != null).reverse();
  if (!measured.length) return show(at("accuracy"), h("p", { class: "empty" }, "The first training puts the first point here."));
  const points = measured.map((record) => ({
    label: record.version,
    value: record.test.candidate_accuracy,
    champion: record.promoted,
    title: `${record.version} ${record.promoted ? "promoted" : "refused"}: ${percent(record.test.candidate_accuracy)} of ${count(record.test.rows)} test rows`,
    href: `/promotions/${record.id}`,
  }));
  const newest = measured.at(-1);
  const heldout = newest.heldout.rows && newest.champion
    ? `On ${count(newest.heldout.rows)} held-out corrections: ${newest.version} ${percent(newest.heldout.candidate_accuracy, 1)}, ${newest.champion} ${percent(newest.heldout.champion_accuracy, 1)}.` : "";
  show(at("accuracy"), accuracyChart(points, at("accuracy").clientWidth),
    h("p", { class: "row legend small muted flush" },
      h("span", {}, h("span", { class: "key" }), "promoted"), h("span", {}, h("span", { class: "key refused" }), "refused"),
      h("span", {}, newest.official_test ? "official test split" : "test split"), h("span", {}, heldout)));
}

function drawTraining() {
  const job = state.jobs[0];
  const target = at("training");
  if (state.why_no_training) return show(target, h("p", { class: "notice warn" }, state.why_no_training), job ? summary(job) : null);
  if (!job) return show(target, h("p", { class: "empty" }, "No job has run yet. ", "Train now makes the first model."));
  show(target, summary(job), isBusy() ? progressOf(job, steps) : null,
    h("p", { class: "small flush" }, state.jobs.slice(1, 5).map((older) => [h("a", { href: `/jobs/${older.id}` }, older.id), ` ${older.state} `, h("span", { class: "muted" }, ago(older.finished)), h("br")])));
}

function summary(job) {
  const rows = job.training_rows == null ? "" : `${count(job.training_rows)} corrections, ${count(job.heldout_rows)} held out`;
  return [
    h("p", { class: "row spread" }, h("a", { class: "strong", href: `/jobs/${job.id}` }, job.id), stateTag(job)),
    h("p", { class: "small muted" }, [job.reason, job.version && `makes ${job.version}`, rows, job.attempt > 1 && `attempt ${job.attempt}`].filter(Boolean).join(" · ")),
    job.error ? h("p", { class: "notice bad small" }, job.error) : null,
  ];
}

function drawDecisions() {
  if (!state.promotions.length) return show(at("decisions"), h("p", { class: "empty" }, "Every promotion and every refusal will be here, with its reasons."));
  show(at("decisions"), h("ul", { class: "decisions" }, state.promotions.slice(0, 6).map((record) => {
    const [kind, word] = record.kind === "rollback" ? ["warn", "rolled back"] : record.promoted ? ["good", "promoted"] : ["bad", "refused"];
    return h("li", {},
      h("div", { class: "row" }, h("a", { class: "strong", href: `/promotions/${record.id}` }, record.version), h("span", { class: `tag ${kind}` }, word),
        record.test && h("span", { class: "small" }, percent(record.test.candidate_accuracy), record.champion ? h("span", { class: "muted" }, ` against ${percent(record.test.champion_accuracy)} of ${record.champion}`) : null),
        h("span", { class: "muted small push" }, when(record.at))),
      h("p", { class: "small muted flush" }, record.reasons.join(" ")));
  })));
}

function drawEdges() {
  if (!state.edges.length) return show(at("edges"), h("p", { class: "empty" }, "An edge appears here when it first asks for the champion."));
  const head = ["Edge", "Serves", "Waiting there", "Pending", "Accepted", "Rejected", "Last seen"];
  const numbers = new Set([2, 3, 4, 5]);
  const row = (edge) => {
    const report = edge.report;
    const sent = state.corrections_by_edge[edge.name] || { pending: 0, accepted: 0, rejected: 0 };
    const isCurrent = state.champion && report.serving?.digest === state.champion.digest;
    const serves = report.serving ? h("span", { class: `tag ${isCurrent ? "good" : "warn"}` }, report.serving.version) : h("span", { class: "tag bad" }, "nothing");
    const refused = report.refused ? h("p", { class: "small notice bad" }, `refused ${report.refused.version}: ${report.refused.reason}`) : null;
    const name = /^https?:\/\//.test(report.url) ? h("a", { href: report.url, rel: "noreferrer" }, edge.name) : edge.name;
    const silent = edge.silent_s > 60;
    const cells = [[h("span", { class: "strong" }, name)], [serves, refused], count(report.outbox) + (report.set_aside ? ` (+${count(report.set_aside)} set aside)` : ""),
      count(sent.pending), count(sent.accepted), count(sent.rejected), h("span", { class: silent ? "tag warn" : "" }, span(edge.silent_s) + " ago")];
    return h("tr", {}, cells.map((cell, index) => h("td", { class: numbers.has(index) ? "number" : "", "data-label": head[index] }, cell)));
  };
  show(at("edges"), h("table", { class: "stacking" }, h("thead", {}, h("tr", {}, head.map((title, index) => h("th", { class: numbers.has(index) ? "number" : "" }, title)))), h("tbody", {}, state.edges.map(row))));
}

async function act(path, said) {
  const note = at("said");
  try {
    const answer = await call("POST", path, { by: "an operator, on the page" });
    note.textContent = said(answer);
    note.className = "notice good";
  } catch (error) {
    note.textContent = error.message;
    note.className = "notice bad";
  }
  note.hidden = false;
  setTimeout(() => { note.hidden = true; }, 8000);
  await look().catch(() => {});
}

at("retrain").addEventListener("click", () => act("/api/v1/jobs", (job) => `${job.id} is ${job.state}.`));
at("rollback").addEventListener("click", () => {
  at("confirm-text").textContent = `Edges will go back from ${state.champion.version} to the champion before it. ${state.champion.version} stays in the registry.`;
  at("confirm").returnValue = "no";
  at("confirm").showModal();
});
at("confirm").addEventListener("close", () => {
  if (at("confirm").returnValue === "yes") act("/api/v1/rollback", (record) => record.reasons.join(" "));
});

addEventListener("resize", () => state && drawAccuracy());
poll(look, at("trouble"));
