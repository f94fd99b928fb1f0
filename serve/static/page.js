// The page of `cembed serve`: search, pages like a picture, adding, and where a page matched. No library, no build step.
"use strict";

const $ = (id) => document.getElementById(id);
const state = { pages: [], at: -1, query: "", total: 0, turn: 0, urls: [] };

async function ask(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...(token ? { Authorization: `Bearer ${token}` } : {}), ...options.headers };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("The server does not answer. Is it running?");
  }
  if (answer.status === 401) {
    await login();
    return ask(path, options);
  }
  if (!answer.ok) {
    const body = await answer.json().catch(() => ({}));
    throw new Error(body.error?.message || `The server answered with status ${answer.status}.`);
  }
  return answer;
}

let asking = null;
function login() {
  asking ??= new Promise((done) => {
    $("login").showModal();
    $("login").addEventListener("close", () => {
      sessionStorage.setItem("token", $("token").value);
      asking = null;
      done();
    }, { once: true });
  });
  return asking;
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function plural(count, word) {
  return `${count.toLocaleString()} ${word}${count === 1 ? "" : "s"}`;
}

async function show(path, options, query) {
  const turn = ++state.turn;
  say("Searching …");
  try {
    const found = await (await ask(path, options)).json();
    if (turn !== state.turn) return;
    state.pages = found.pages;
    state.total = found.total;
    state.query = query;
    draw();
    say(found.pages.length ? `${plural(found.pages.length, "page")} of ${found.total.toLocaleString()}, the best first` : "");
  } catch (error) {
    if (turn === state.turn) say(error.message, true);
  }
}

function search(query) {
  history.replaceState(null, "", query ? `?q=${encodeURIComponent(query)}` : "./");
  document.title = query ? `${query} – search pages` : "Search pages";
  return query ? show(`search?top=24&q=${encodeURIComponent(query)}`, {}, query) : count();
}

function like(file) {
  $("query").value = "";
  return show("search?top=24", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } }, "");
}

async function count() {
  const turn = ++state.turn;
  try {
    state.total = (await (await ask("search?top=1&q=page")).json()).total;
    if (turn !== state.turn) return;
    state.pages = [];
    say("");
    draw();
  } catch (error) {
    say(error.message, true);
  }
}

function draw() {
  state.urls.splice(0).forEach((url) => URL.revokeObjectURL(url));
  $("empty").hidden = state.total > 0;
  $("welcome").hidden = state.total === 0 || state.pages.length > 0;
  $("count").textContent = plural(state.total, "page");
  $("results").replaceChildren(...state.pages.map(card));
}

function card(page, at) {
  const button = element("button", "", "");
  button.type = "button";
  const thumb = element("span", "thumb", "");
  button.append(thumb, element("span", "name", page.source));
  const about = element("span", "about", "");
  about.append(element("span", "", `page ${page.page}`), element("span", "", `score ${page.score.toFixed(2)}`));
  button.append(about);
  if (page.warning) button.append(element("span", "bad", page.warning));
  button.addEventListener("click", () => open(at));
  picture(page).then(
    (url) => { thumb.replaceChildren(Object.assign(new Image(), { src: url, alt: "" })); },
    () => { thumb.textContent = "no picture"; },
  );
  const item = document.createElement("li");
  item.append(button);
  return item;
}

function element(kind, name, text) {
  return Object.assign(document.createElement(kind), { className: name, textContent: text });
}

async function picture(page) {
  page.url ??= (async () => {
    const url = URL.createObjectURL(await (await ask(`pages/${encodeURIComponent(page.id)}/thumbnail`)).blob());
    state.urls.push(url);
    return url;
  })();
  return page.url;
}

async function open(at) {
  state.at = at;
  const page = state.pages[at];
  $("page-title").textContent = `${page.source}, page ${page.page}`;
  $("before").disabled = at === 0;
  $("after").disabled = at === state.pages.length - 1;
  $("heat-label").hidden = !state.query;
  clear();
  pageSays("");
  $("picture").removeAttribute("src");
  $("picture").alt = `${page.source}, page ${page.page}`;
  if (!$("page").open) $("page").showModal();
  try {
    $("picture").src = await picture(page);
    if (state.query && $("heat").checked) await heat(page);
  } catch (error) {
    if (state.pages[state.at] === page) pageSays(error.message, true);
  }
}

function pageSays(text, bad = false) {
  $("page-status").textContent = text;
  $("page-status").classList.toggle("bad", bad);
}

function clear() {
  const map = $("map");
  map.width = map.height = 1;
  $("box").hidden = true;
}

async function heat(page) {
  pageSays("Looking for where it matched …");
  page.heat ??= ask(`pages/${encodeURIComponent(page.id)}/explain?q=${encodeURIComponent(state.query)}`).then((a) => a.json());
  let found;
  try {
    found = await page.heat;
  } catch (error) {
    page.heat = undefined;
    throw error;
  }
  if (state.pages[state.at] !== page || !$("heat").checked) return;
  paint(found.heat);
  const [left, top, right, bottom] = found.hottest.map((share) => 100 * share);
  Object.assign($("box").style, { left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%` });
  $("box").hidden = right <= left;
  pageSays(right > left ? `It matched most at ${place(found.hottest)}.` : "No part of the page stands out.");
}

function place([left, top, right, bottom]) {
  const name = (value, names) => names[Math.min(2, Math.floor(3 * value))];
  const across = name((left + right) / 2, ["left", "middle", "right"]);
  const down = name((top + bottom) / 2, ["top", "middle", "bottom"]);
  return down === "middle" && across === "middle" ? "the middle of the page" : `the ${down} ${across}`;
}

// A cell is a pixel of a small canvas; the browser smooths it as it is made larger.
function paint(rows) {
  const map = $("map");
  map.width = rows[0].length;
  map.height = rows.length;
  const context = map.getContext("2d");
  const pixels = context.createImageData(map.width, map.height);
  rows.flat().forEach((value, i) => pixels.data.set([230, Math.round(170 * (1 - value)), 0, Math.round(150 * Math.sqrt(value))], 4 * i));
  context.putImageData(pixels, 0, 0);
}

async function add(files) {
  for (const file of files) await addOne(file);
  $("query").value ? await search($("query").value) : await count();
}

async function addOne(file) {
  const row = document.createElement("li");
  const bar = Object.assign(document.createElement("progress"), { max: 1 });
  bar.setAttribute("aria-label", `Adding ${file.name}`);
  const note = element("span", "", "sending …");
  row.append(element("span", "name", file.name), bar, note);
  $("adding").append(row);
  let added = 0;
  const wrong = [];
  try {
    const headers = { "Content-Type": "application/octet-stream", Accept: "application/x-ndjson" };
    const answer = await ask(`pages?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file, headers });
    for await (const page of lines(answer.body)) {
      if (page.error) wrong.push(page.number ? `page ${page.number}: ${page.error}` : page.error);
      else added += 1;
      if (page.pages) Object.assign(bar, { max: page.pages, value: page.number });
      note.textContent = page.pages ? `page ${page.number} of ${page.pages}` : "";
    }
  } catch (error) {
    wrong.push(error.message);
  }
  bar.remove();
  note.textContent = [`${plural(added, "page")} added`, ...wrong].join("; ");
  note.classList.toggle("bad", wrong.length > 0);
  if (!wrong.length) setTimeout(() => row.remove(), 6000);
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

function chosen(id, use) {
  $(id).addEventListener("change", () => {
    const files = [...$(id).files];
    $(id).value = "";
    if (files.length) use(files);
  });
}

function drops() {
  let depth = 0;
  const end = () => { depth = 0; $("drop").hidden = true; };
  document.addEventListener("dragenter", (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    depth += 1;
    $("drop").hidden = false;
  });
  document.addEventListener("dragleave", () => { depth -= 1; if (depth <= 0) end(); });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    for (const target of document.querySelectorAll("#drop [data-do]")) target.classList.toggle("over", target === event.target);
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    end();
    const files = [...event.dataTransfer.files];
    if (!files.length) return;
    event.target.dataset?.do === "like" ? like(files[0]) : add(files);
  });
}

$("search").addEventListener("submit", (event) => { event.preventDefault(); search($("query").value.trim()); });
$("close").addEventListener("click", () => $("page").close());
$("before").addEventListener("click", () => open(state.at - 1));
$("after").addEventListener("click", () => open(state.at + 1));
$("picture").addEventListener("load", ({ target }) => target.parentElement.style.setProperty("--ratio", target.naturalWidth / target.naturalHeight));
$("heat").addEventListener("change", () => open(state.at));
$("page").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft" && state.at > 0) open(state.at - 1);
  if (event.key === "ArrowRight" && state.at < state.pages.length - 1) open(state.at + 1);
});
$("page").addEventListener("close", () => $("results").children[state.at]?.firstChild.focus());
chosen("like", (files) => like(files[0]));
chosen("camera", (files) => like(files[0]));
chosen("add", add);
drops();
$("query").value = new URLSearchParams(location.search).get("q") ?? "";
search($("query").value);
