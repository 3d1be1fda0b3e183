"use strict";
/* What the report's page does: search, galleries, map. Its data are JSON in the page; see train/report/explore.py.
   Captions are text of strangers: they go into the page as text nodes only. */

const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const KINDS = ["keyword", "caption", "class"];

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

/* Where an item is: which sheet, and column and row in it. */
function cell(item) {
  const held = item < data.shown;
  const sheet = data.sheets[held ? 0 : 1];
  const place = held ? item : item - data.shown;
  return { sheet, column: place % sheet.columns, row: Math.floor(place / sheet.columns) };
}

function thumb(item) {
  const { sheet, column, row } = cell(item);
  const picture = make("span", "thumb");
  const share = (place, count) => (count > 1 ? (100 * place) / (count - 1) : 0) + "%";
  picture.style.backgroundImage = `url("${sheet.file}")`;
  picture.style.backgroundSize = `${100 * sheet.columns}% ${100 * sheet.rows}%`;
  picture.style.backgroundPosition = `${share(column, sheet.columns)} ${share(row, sheet.rows)}`;
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", named(item));
  return picture;
}

const named = (item) => data.items[item].t || data.items[item].c || "image " + item;

function hit(item, right, caption = true) {
  const button = make("button", "hit" + (right ? " right" : "") + (item >= data.shown ? " seen" : ""));
  button.type = "button";
  button.title = named(item);
  button.append(thumb(item));
  if (caption) button.append(make("small", "", named(item)));
  button.addEventListener("click", () => show(item));
  return button;
}

function rank(position) {
  return make("span", "rank" + (position === 1 ? " first" : ""), "rank " + position.toLocaleString("en"));
}

/* ---- Search ---- */

const input = find("query");
const list = find("matches");
let asked = -1;
let everything = false;
let offered = [];
let active = -1;

const plain = (text) => text.normalize("NFKD").toLowerCase();
const words = data.queries.map((query) => plain(query.t));

/* Queries for what is typed: those that begin with it, then those with a word that does, then those that have it. */
function matching(typed) {
  const wanted = plain(typed).trim();
  const found = [[], [], []];
  words.forEach((text, number) => {
    if (text.startsWith(wanted)) found[0].push(number);
    else if (text.includes(" " + wanted)) found[1].push(number);
    else if (text.includes(wanted)) found[2].push(number);
  });
  found[0].sort((a, b) => words[a].length - words[b].length);
  return found.flat().slice(0, 8);
}

function offer() {
  offered = matching(input.value);
  active = offered.length ? 0 : -1;
  list.replaceChildren(
    ...offered.map((number, place) => {
      const line = make("li");
      line.id = "match" + place;
      line.setAttribute("role", "option");
      line.append(make("span", "", data.queries[number].t), make("span", "kind", data.queries[number].k));
      line.addEventListener("pointerdown", (event) => {
        event.preventDefault();
        ask(number);
      });
      return line;
    }),
  );
  if (!offered.length) list.append(make("li", "none", "Nothing prepared begins like this; the model itself is not here."));
  open(true);
  mark();
}

function open(is) {
  list.hidden = !is;
  input.setAttribute("aria-expanded", String(is));
}

function mark() {
  [...list.children].forEach((line, place) => line.setAttribute("aria-selected", String(place === active)));
  if (active >= 0) input.setAttribute("aria-activedescendant", "match" + active);
  else input.removeAttribute("aria-activedescendant");
}

function ask(number) {
  asked = number;
  input.value = data.queries[number].t;
  open(false);
  answer();
  try {
    history.replaceState(null, "", "#" + encodeURIComponent(data.queries[number].t));
  } catch (error) {
    /* Some viewers of local files have no history. */
  }
}

function answer() {
  const query = data.queries[asked];
  const near = everything && query.a ? query.a : query.n;
  const right = new Set(query.r);
  const pool = everything ? data.searched + data.items.length - data.shown : data.searched;
  const frame = { class: "is of this class", keyword: "has this in its caption", caption: "has this caption" }[query.k];
  const says = find("says");
  says.replaceChildren(
    `The nearest of ${pool.toLocaleString("en")} images to `,
    make("b", "", "“" + query.t + "”"),
    near.some((item) => right.has(item)) ? `, best first. A green frame: it ${frame}.` : ", best first.",
  );
  find("found").replaceChildren(...near.map((item) => hit(item, right.has(item))));
}

function startSearch() {
  input.addEventListener("input", offer);
  input.addEventListener("focus", () => {
    input.select();
    offer();
  });
  input.addEventListener("blur", () => open(false));
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (list.hidden) offer();
      else if (offered.length) active = (active + (event.key === "ArrowDown" ? 1 : offered.length - 1)) % offered.length;
      mark();
      if (active >= 0) list.children[active].scrollIntoView({ block: "nearest" });
    } else if (event.key === "Enter" && !list.hidden && active >= 0) {
      ask(offered[active]);
    } else if (event.key === "Escape") {
      open(false);
    }
  });
  find("pool")?.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    everything = button.dataset.pool === "all";
    for (const one of find("pool").children) one.setAttribute("aria-pressed", String(one === button));
    answer();
  });
  const pills = examples().map((number) => {
    const pill = make("button", "pill", data.queries[number].t);
    pill.type = "button";
    pill.addEventListener("click", () => ask(number));
    return pill;
  });
  find("examples").append(...pills);
  const wanted = fromAddress();
  asked = wanted >= 0 ? wanted : (examples()[0] ?? 0);
  input.value = wanted >= 0 ? data.queries[asked].t : "";
  answer();
  addEventListener("hashchange", () => fromAddress() >= 0 && ask(fromAddress()));
}

function fromAddress() {
  try {
    const text = decodeURIComponent(location.hash.slice(1));
    return data.queries.findIndex((query) => query.t === text);
  } catch (error) {
    return -1;
  }
}

/* A few queries of each kind, at even distances. */
function examples() {
  return KINDS.flatMap((kind) => {
    const all = data.queries.map((query, number) => number).filter((number) => data.queries[number].k === kind);
    const count = Math.min(all.length, kind === "keyword" ? 5 : 3);
    return Array.from({ length: count }, (_, place) => all[Math.floor(((place + 0.5) * all.length) / count)]);
  });
}

/* ---- One image, large ---- */

function show(item) {
  const dialog = find("image");
  const one = make("div", "one");
  const side = make("div");
  const { t, c } = data.items[item];
  side.append(make("h3", "", named(item)));
  if (c && t) side.append(make("p", "label", c));
  const texts = data.texts[item];
  if (item < data.searched && texts.length) {
    side.append(make("div", "label", "The captions nearest to it, best first"));
    const pills = make("div", "pills");
    for (const number of texts) {
      const pill = make("button", "pill", data.queries[number].t);
      pill.type = "button";
      if (data.queries[number].t === t) pill.style.borderColor = "var(--accent)";
      pill.addEventListener("click", () => {
        dialog.close();
        ask(number);
        find("search").scrollIntoView();
      });
      pills.append(pill);
    }
    side.append(pills);
  } else if (item >= data.shown) {
    side.append(make("p", "", "The model was trained on this image."));
  }
  one.append(thumb(item), side);
  find("one").replaceChildren(one);
  dialog.showModal();
}

/* ---- Galleries ---- */

function startGalleries() {
  for (const one of data.text_gallery) {
    const line = make("div", "asked");
    const text = make("div");
    text.append(make("span", "", one.t + " "), make("br"), rank(one.position));
    line.append(text, ...one.near.map((item) => hit(item, item === one.right, false)));
    find("texts").append(line);
  }
  for (const one of data.image_gallery) {
    const card = make("div", "read");
    const side = make("div");
    const lines = make("ol");
    for (const [text, right] of one.near) {
      const line = make("li", right ? "right" : "", text);
      line.title = text;
      lines.append(line);
    }
    side.append(lines, rank(one.position));
    card.append(hit(one.image, false, false), side);
    find("images").append(card);
  }
}

/* ---- Map ---- */

function startMap() {
  const { images, texts } = data.map;
  const canvas = find("plane");
  const tip = find("tip");
  const context = canvas.getContext("2d");
  const sheet = new Image();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let over = null; // {item, text}: what the pointer is at
  let size = { width: 0, height: 0, radius: 0 };

  const at = ([x, y]) => [
    size.width / 2 + x * (size.width / 2 - size.radius - 8),
    size.height / 2 - y * (size.height / 2 - size.radius - 8),
  ];

  function picture(item, radius) {
    const [x, y] = at(images[item]);
    const { sheet: place, column, row } = cell(item);
    const side = sheet.naturalWidth / place.columns;
    context.save();
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.clip();
    context.drawImage(sheet, column * side, row * side, side, side, x - radius, y - radius, 2 * radius, 2 * radius);
    context.restore();
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.stroke();
  }

  function draw() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name, alpha) => `rgba(${style.getPropertyValue(name)}, ${alpha})`;
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    context.clearRect(0, 0, size.width, size.height);
    context.fillStyle = colour("--text", 0.75);
    for (const point of texts) {
      if (!point) continue;
      context.beginPath();
      context.arc(...at(point), 3.5, 0, 2 * Math.PI);
      context.fill();
    }
    context.strokeStyle = colour("--image", 0.55);
    context.lineWidth = 1.5;
    if (sheet.complete && sheet.naturalWidth) images.forEach((_, item) => picture(item, size.radius));
    if (!over) return;
    context.lineWidth = 2.5;
    context.strokeStyle = colour("--text", 1);
    if (texts[over.item]) {
      context.beginPath();
      context.moveTo(...at(images[over.item]));
      context.lineTo(...at(texts[over.item]));
      context.stroke();
      context.fillStyle = colour("--text", 1);
      context.beginPath();
      context.arc(...at(texts[over.item]), 6, 0, 2 * Math.PI);
      context.fill();
    }
    context.strokeStyle = colour("--image", 1);
    if (sheet.complete && sheet.naturalWidth) picture(over.item, size.radius + 6);
  }

  function resize() {
    const width = canvas.parentElement.clientWidth;
    const height = Math.round(width < 600 ? width * 1.15 : width * 0.62);
    const crowd = Math.sqrt((width * height) / Math.max(images.length, 60));
    size = { width, height, radius: Math.max(7, Math.min(17, crowd * 0.27)) };
    canvas.width = width * devicePixelRatio;
    canvas.height = height * devicePixelRatio;
    canvas.style.height = height + "px";
    draw();
  }

  function nearest(x, y) {
    let best = null;
    let least = Math.max(20, size.radius + 6);
    const look = (point, item, text) => {
      if (!point) return;
      const [px, py] = at(point);
      const distance = Math.hypot(px - x, py - y);
      if (distance < least) [best, least] = [{ item, text, x: px, y: py }, distance];
    };
    texts.forEach((point, item) => look(point, item, true));
    images.forEach((point, item) => look(point, item, false));
    return best;
  }

  function point(event) {
    const box = canvas.getBoundingClientRect();
    const found = nearest(event.clientX - box.left, event.clientY - box.top);
    if (found?.item === over?.item && found?.text === over?.text) return;
    over = found;
    tip.hidden = !over;
    canvas.style.cursor = over ? "pointer" : "";
    if (over) {
      tip.replaceChildren(thumb(over.item), make("div", "", named(over.item)), make("div", "label", over.text ? "its caption" : "image"));
      tip.style.left = Math.max(0, Math.min(size.width - 152, over.x - 76)) + "px";
      const above = over.y - tip.offsetHeight - size.radius - 14;
      tip.style.top = (above > -60 ? above : over.y + size.radius + 14) + "px";
    }
    draw();
  }

  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("pointerleave", () => {
    over = null;
    tip.hidden = true;
    draw();
  });
  canvas.addEventListener("click", () => over && show(over.item));
  dark.addEventListener("change", draw);
  addEventListener("resize", resize);
  sheet.addEventListener("load", draw);
  sheet.src = data.sheets[0].file;
  resize();
}

if (data.queries.length) startSearch();
startGalleries();
if (data.map.images) startMap();
document.documentElement.dataset.ready = "yes";
