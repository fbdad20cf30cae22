// The browser of answers. Texts are data: they reach the page by textContent alone.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const get = (id) => document.getElementById(id);
const PAGE = 100;
const state = { found: [], at: -1, page: 0, protocol: 0 };

function make(tag, options = {}, ...children) {
  const { text, kind, ...attributes } = options;
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter(Boolean));
  return element;
}

function fill(id, choices) {
  get(id).replaceChildren(...choices.map(([value, text]) => make("option", { value, text })));
}

function distinct(lists) {
  return [...new Set(lists.flat())].sort().map((name) => [name, name]);
}

function verdicts(item) {
  return item.answers.map((answer) => answer.right[state.protocol]);
}

// Whether models differ; of rollouts, whether the completions of a group do.
function differs(item) {
  const all = item.answers.length > 1
    ? verdicts(item)
    : item.answers.flatMap((answer) => answer.replies.map((reply) => reply.right[state.protocol]));
  return new Set(all).size > 1;
}

function fits(item, verdict) {
  const [kind, model] = verdict.split(" ");
  if (kind === "all") return true;
  if (kind === "differ") return differs(item);
  const answer = item.answers.find((one) => one.model === Number(model));
  return answer !== undefined && answer.right[state.protocol] === (kind === "right");
}

// All texts of a question in small letters, made when they are first searched.
function haystack(item) {
  item.text ??= [item.id, item.question, item.gold, ...item.options.flat(), ...item.groups,
    ...item.answers.flatMap((answer) => answer.replies.map((reply) => reply.text))].join("\n").toLowerCase();
  return item.text;
}

function filter() {
  state.protocol = Number(get("protocol").value);
  const set = Number(get("set").value);
  const [specialty, modality, verdict] = ["specialty", "modality", "verdict"].map((id) => get(id).value);
  const words = get("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  state.found = data.items.filter((item) => item.set === set
    && (!specialty || item.specialties.includes(specialty)) && (!modality || item.modality === modality)
    && fits(item, verdict) && words.every((word) => haystack(item).includes(word)));
  const models = [...new Set(state.found.flatMap((item) => item.answers.map((answer) => answer.model)))].sort((a, b) => a - b);
  get("order").textContent = models.length ? `${mark(true)} right, ${mark(false)} wrong: ${models.map((m) => data.models[m]).join(", ")}` : "";
  get("count").textContent = `${state.found.length.toLocaleString("en")} of `
    + `${data.items.filter((item) => item.set === set).length.toLocaleString("en")} questions`;
  choose(state.found.length ? 0 : -1);
}

// What the chosen set of questions can be filtered by.
function choices() {
  const items = data.items.filter((item) => item.set === Number(get("set").value));
  fill("specialty", [["", "all"], ...distinct(items.map((item) => item.specialties))]);
  fill("modality", [["", "all"], ...distinct(items.map((item) => item.modality))]);
  const models = [...new Set(items.flatMap((item) => item.answers.map((answer) => answer.model)))].sort((a, b) => a - b);
  const several = models.length > 1 ? "models disagree" : "answers disagree";
  fill("verdict", [["all", "all"], ["differ", several],
    ...models.flatMap((model) => ["right", "wrong"].map((kind) => [`${kind} ${model}`, `${data.models[model]}: ${kind}`]))]);
}

function mark(right) {
  return right ? "\u2713" : "\u2717";
}

function row(item, place) {
  const marks = item.answers.map((answer) => mark(answer.right[state.protocol])).join(" ");
  const told = item.answers.map((answer) => `${data.models[answer.model]} ${answer.right[state.protocol] ? "right" : "wrong"}`);
  const line = make("span", { kind: "marks" },
    make("span", { text: marks, role: "img", "aria-label": told.join(", ") }), ` ${item.modality}`);
  const element = make("li", { role: "option", id: `row${place}`, "aria-selected": place === state.at },
    make("span", { kind: "text", text: item.question || item.id }), line);
  element.addEventListener("click", () => choose(place));
  return element;
}

function list() {
  const start = state.page * PAGE;
  const last = Math.max(0, Math.ceil(state.found.length / PAGE) - 1);
  get("list").replaceChildren(...state.found.slice(start, start + PAGE).map((item, n) => row(item, start + n)));
  get("page").textContent = `page ${state.page + 1} of ${last + 1}`;
  get("previous").disabled = state.page === 0;
  get("next").disabled = state.page >= last;
}

function choose(place) {
  state.at = place;
  state.page = Math.max(0, Math.floor(place / PAGE));
  list();
  const chosen = get(`row${place}`);
  if (chosen) {
    get("list").setAttribute("aria-activedescendant", chosen.id);
    const box = get("list");
    if (chosen.offsetTop < box.scrollTop) box.scrollTop = chosen.offsetTop;
    const below = chosen.offsetTop + chosen.offsetHeight - box.clientHeight;
    if (below > box.scrollTop) box.scrollTop = below;
  } else get("list").removeAttribute("aria-activedescendant");
  show(state.found[place]);
}

function show(item) {
  if (!item) return get("shown").replaceChildren(make("p", { kind: "none", text: "No question fits." }));
  const tags = [data.sets[item.set], ...item.specialties, item.modality, item.kind, ...item.groups, item.id];
  const pictures = item.pictures.map((place, n) => make("img", { src: data.pictures[place], alt: `image ${n + 1}` }));
  if (item.hidden) pictures.push(make("p", { kind: "none", text: `${item.hidden} not shown: see above` }));
  if (!pictures.length) pictures.push(make("p", { kind: "none", text: "no image here" }));
  get("shown").replaceChildren(
    make("div", { kind: "tags" }, ...tags.filter((text) => text !== "not stated").map((text) => make("span", { kind: "tag", text }))),
    make("div", { kind: "ask" }, make("div", { kind: "pictures" }, ...pictures),
      make("div", {}, make("p", { kind: "question", text: item.question || "(the question's text is not here)" }), options(item))),
    ...item.answers.flatMap((answer) => said(answer)));
}

// Options with the right one marked, and which models chose each; of a model that chose several, under which perspectives.
function options(item) {
  const chosen = new Map();
  for (const answer of item.answers) {
    const under = Map.groupBy(answer.replies, (reply) => reply.picked[state.protocol]);
    under.delete(null);
    for (const [letter, replies] of under) {
      const part = replies.length < answer.replies.length;
      const name = data.models[answer.model] + (part ? ` (${replies.map((reply) => reply.perspective).join(", ")})` : "");
      chosen.set(letter, [...(chosen.get(letter) ?? []), name]);
    }
  }
  const lines = item.options.length ? item.options : [[item.gold, ""]];
  return make("ul", { kind: "options" }, ...lines.map(([letter, text]) => {
    const gold = letter === item.gold;
    const label = (text ? `${letter}. ${text}` : letter) + (gold ? " \u2713 right answer" : "");
    const who = chosen.get(letter);
    return make("li", { kind: gold ? "gold" : "" }, label, who && make("span", { kind: "who", text: ` \u2190 ${who.join("; ")}` }));
  }));
}

function said(answer) {
  const right = answer.right[state.protocol];
  const several = answer.replies.length > 1;
  const verdict = answer.replies.length ? `${mark(right)} ${right ? "right" : "wrong"}${several ? ` ${answer.by}` : ""}` : "not here";
  return [make("h4", { text: `${data.models[answer.model]}: ${verdict}` }),
    make("div", { kind: "replies" }, ...answer.replies.map(reply))];
}

function reply(one) {
  const right = one.right[state.protocol];
  const picked = one.picked[state.protocol];
  const facts = [right ? `${mark(true)} right` : `${mark(false)} wrong`];
  if (picked !== null) facts.push(`picked ${picked}`);
  if (!one.parsed) facts.push("unparsed (robust)");
  if (one.cut) facts.push("cut off");
  if (one.tokens !== null) facts.push(`${one.tokens} tokens`);
  const number = (value) => (value === null || value === undefined ? "not checkable" : Number(value.toFixed(3)));
  const lines = [make("p", { text: facts.join(" \u00b7 ") })];
  if (one.refused) lines.push(make("p", { text: `refused: ${one.refused}` }));
  if (one.adherence !== null && one.adherence !== undefined) lines.push(make("p", { text: `adherence ${number(one.adherence)}` }));
  if (one.advantage !== null && one.advantage !== undefined) lines.push(make("p", { text: `advantage ${number(one.advantage)}` }));
  const held = (wanted) => one.criteria.filter(([, value]) => wanted(value));
  const names = (found, exact) => found.map(([name, value]) => (exact ? `${name} ${number(value)}` : name)).join(", ");
  for (const [title, found, exact] of [["criteria that held", held((v) => v === 1), false],
    ["held in part", held((v) => v !== null && v > 0 && v < 1), true], ["did not hold", held((v) => v === 0), false],
    ["could not be checked", held((v) => v === null), false]])
    if (found.length) lines.push(make("p", { text: `${title}: ${names(found, exact)}` }));
  const text = one.text + (one.more ? `\n\u2026 ${one.more.toLocaleString("en")} more characters` : "");
  return make("div", { kind: `reply ${right ? "right" : "wrong"}` }, make("h5", { text: one.perspective ?? "no perspective" }),
    ...lines, make("div", { kind: "said", text: text || "(empty)", tabindex: "0", role: "region", "aria-label": "answer" }));
}

function keys(event) {
  const last = state.found.length - 1;
  const moves = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
  if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey || last < 0) return;
  event.preventDefault();
  choose(Math.min(last, Math.max(0, state.at + moves[event.key])));
}

fill("set", data.sets.map((name, place) => [place, name]));
fill("protocol", data.protocols.map((name, place) => [place, name]));
choices();
get("set").addEventListener("change", choices);
for (const id of ["set", "specialty", "modality", "protocol", "verdict"]) get(id).addEventListener("change", filter);
let waiting;
get("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
get("filters").addEventListener("submit", (event) => event.preventDefault());
get("list").addEventListener("keydown", keys);
get("previous").addEventListener("click", () => choose((state.page - 1) * PAGE));
get("next").addEventListener("click", () => choose((state.page + 1) * PAGE));
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
if (data.items.length) filter();
else get("shown").replaceChildren(make("p", { kind: "none", text: "No answers in these runs." }));
