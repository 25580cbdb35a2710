// What the hub's pages share: making elements (never from markup), calling the API, showing numbers and times.

const SVG = "http://www.w3.org/2000/svg";

export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(9).filter((child) => child != null && child !== false));
  return element;
}

// Replace an element's children, but leave it alone where nothing changed; a link that has the focus keeps it.
export function show(element, ...children) {
  const made = h(element.tagName, {}, ...children);
  if (made.innerHTML === element.innerHTML) return;
  const focused = element.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  element.replaceChildren(...made.childNodes);
  if (focused) element.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
}

export async function call(method, path, body) {
  const request = { method, headers: { Accept: "application/json" }, signal: AbortSignal.timeout(20000) };
  if (body !== undefined) {
    request.body = JSON.stringify(body);
    request.headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, request);
  } catch {
    throw new Error("The hub does not answer. This page goes on by itself when it does.");
  }
  if (response.status === 401) location.assign("/login?next=" + encodeURIComponent(location.pathname));
  const isJson = (response.headers.get("Content-Type") || "").startsWith("application/json");
  const answer = isJson ? await response.json() : await response.text();
  if (!response.ok) throw new Error(answer.error ? `${answer.error.message} ${answer.error.next}` : `The hub answered ${response.status}.`);
  return answer;
}

// Call `look` again and again: soon while it returns true, slowly otherwise, not at all while nobody looks.
export function poll(look, trouble) {
  const turn = async () => {
    let pause = 3000;
    if (!document.hidden) {
      try {
        pause = (await look()) ? 700 : 2000;
        trouble.hidden = true;
      } catch (error) {
        trouble.textContent = error.message;
        trouble.hidden = false;
      }
    }
    setTimeout(turn, pause);
  };
  document.addEventListener("visibilitychange", () => document.hidden || look().catch(() => {}));
  turn();
}

export const count = (number) => number.toLocaleString("en");
export const percent = (share, digits = 2) => (share == null ? "–" : `${(share * 100).toFixed(digits)} %`);

export function ago(time) {
  return time ? span((Date.now() - Date.parse(time)) / 1000) + " ago" : "–";
}

export function span(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 90) return `${whole} s`;
  if (whole < 5400) return `${Math.round(whole / 60)} min`;
  if (whole < 129600) return `${Math.round(whole / 3600)} h`;
  return `${Math.round(whole / 86400)} days`;
}

export function when(time) {
  return h("time", { datetime: time, title: time ? new Date(time).toLocaleString() : "" }, ago(time));
}
