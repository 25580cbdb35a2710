// How a training job is shown, on the start page and on its own.

import { count, h, percent } from "./dom.js";
import { lossChart } from "./charts.js";

const STAGES = { data: "data", train: "train", evaluate: "measure", export: "export", register: "sign & push" };
const KIND = { queued: "accent", running: "accent", succeeded: "good", failed: "bad" };

export function stateTag(job) {
  return h("span", { class: `tag ${KIND[job.state]}` }, job.state === "running" ? h("span", { class: "pulse" }) : null, job.state);
}

export function stages(job) {
  const names = Object.keys(STAGES);
  const at = job.state === "succeeded" ? names.length : job.progress ? names.indexOf(job.progress.stage) : -1;
  return h("ol", { class: "stages" }, names.map((name, index) =>
    h("li", { class: index < at ? "done" : index === at && job.state === "running" ? "now" : "" }, STAGES[name])));
}

export function progressOf(job, steps) {
  const now = job.progress;
  const losses = (steps || []).filter((step) => step.stage === "train" && step.loss != null).map((step) => step.loss);
  const said = [];
  if (now && now.loss != null) said.push(`loss ${now.loss.toFixed(4)}`);
  if (now && now.accuracy != null) said.push(`accuracy ${percent(now.accuracy)}`);
  if (now && now.note) said.push(now.note);
  return [
    stages(job),
    job.state === "running" && now && now.total
      ? h("progress", { max: now.total, value: now.done, "aria-label": `${now.done} of ${now.total}` })
      : job.state === "running" ? h("progress", { "aria-label": "working" }) : null,
    h("p", { class: "row spread small muted" },
      h("span", {}, job.state === "running" && now && now.total ? `${count(now.done)} of ${count(now.total)}` : ""),
      h("span", {}, said.join(" · "))),
    losses.length > 1 ? lossChart(losses) : null,
  ];
}
