"use strict";
// The page works without this file: the form is then sent as a whole. This adds dropping, pasting, enlarging, and
// results that come in place.

const form = document.getElementById("ask");
const results = document.getElementById("results");
const text = document.getElementById("text");
const where = document.getElementById("where");
const like = document.getElementById("like");
const picker = document.getElementById("image");
const chosen = document.getElementById("chosen");
const likeChip = document.getElementById("like-chip");
const dialog = document.getElementById("large");
let running = null;

// --- asking ---

async function search() {
  running?.abort();
  const mine = (running = new AbortController());
  results.setAttribute("aria-busy", "true");
  try {
    const response = await fetch("results", { method: "POST", body: new FormData(form), signal: mine.signal });
    results.innerHTML = await response.text(); // escaped by the server
    remember();
  } catch (error) {
    if (mine.signal.aborted) return;
    complain(form.dataset.failed);
  }
  results.removeAttribute("aria-busy");
}

function complain(message) {
  const line = Object.assign(document.createElement("p"), { className: "error", textContent: message });
  line.setAttribute("role", "alert");
  results.replaceChildren(line);
}

// The address keeps what can be asked again by it: everything but uploads.
function remember() {
  const asked = new URLSearchParams();
  for (const [name, value] of new FormData(form)) if (typeof value === "string" && value) asked.set(name, value);
  history.replaceState(null, "", picker.files.length ? "./" : `?${asked}`);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (text.value.trim() || picker.files.length || like.value) search();
});

text.addEventListener("keydown", (event) => {
  // While an input method composes a Vietnamese or Chinese word, Enter belongs to it.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.closest("input, textarea, select, dialog")) {
    event.preventDefault();
    text.focus();
  }
});

// --- images ---

function setFiles(files) {
  const most = Number(form.dataset.images);
  const size = files.reduce((sum, file) => sum + file.size, 0);
  if (files.length > most) return complain(form.dataset.tooMany);
  if (size > Number(form.dataset.bytes) * 0.98) return complain(form.dataset.tooLarge);
  const held = new DataTransfer();
  files.forEach((file) => held.items.add(file));
  picker.files = held.files;
  showFiles();
  if (files.length) search();
}

function showFiles() {
  chosen.querySelectorAll(".chip.image").forEach((chip) => {
    URL.revokeObjectURL(chip.querySelector("img").src);
    chip.remove();
  });
  [...picker.files].forEach((file, number) => {
    const chip = Object.assign(document.createElement("span"), { className: "chip image" });
    const image = Object.assign(document.createElement("img"), { src: URL.createObjectURL(file), alt: file.name });
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "×" });
    remove.setAttribute("aria-label", `${form.dataset.remove}: ${file.name}`);
    remove.addEventListener("click", () => setFiles([...picker.files].filter((_, other) => other !== number)));
    chip.append(image, remove);
    chosen.append(chip);
  });
}

const imagesOf = (transfer) => [...transfer.files].filter((file) => file.type.startsWith("image/"));

function addFrom(event, transfer) {
  const images = imagesOf(transfer);
  if (!images.length) return;
  event.preventDefault();
  setFiles([...picker.files, ...images]);
}

picker.addEventListener("change", () => setFiles([...picker.files]));
document.addEventListener("paste", (event) => addFrom(event, event.clipboardData));
document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  if (event.dataTransfer.types.includes("Files")) event.preventDefault();
  addFrom(event, event.dataTransfer);
});

// --- going on from a result ---

function setLike(id) {
  like.value = id;
  likeChip.hidden = !id;
  likeChip.querySelector("b").textContent = id;
}

likeChip.querySelector("button").addEventListener("click", () => setLike(""));

results.addEventListener("click", (event) => {
  const target = event.target.closest("[data-like], [data-where], [data-large]");
  if (!target) return;
  if (target.dataset.large) return enlarge(target);
  if (target.dataset.like) {
    setLike(target.dataset.like);
    text.value = "";
    picker.value = "";
    showFiles();
  } else if (!where.value.includes(target.dataset.where)) {
    where.value = where.value.trim() ? `(${where.value.trim()}) AND ${target.dataset.where}` : target.dataset.where;
  }
  search();
  window.scrollTo({ top: 0, behavior: "smooth" });
});

// An image that cannot be shown leaves its name.
results.addEventListener(
  "error",
  ({ target }) => {
    const { alt, dataset, parentElement } = target;
    parentElement.classList.add("gone");
    parentElement.disabled = true;
    parentElement.textContent = `${alt}: ${dataset.missing}`;
  },
  true,
);

// --- enlarging ---

let shown = null;

function enlarge(button) {
  shown = button;
  const [image, caption] = [dialog.querySelector("img"), dialog.querySelector("p")];
  image.src = button.dataset.large;
  image.alt = button.querySelector("img").alt;
  caption.textContent = button.dataset.caption;
  if (!dialog.open) dialog.showModal();
}

function step(by) {
  const all = [...results.querySelectorAll("[data-large]:not(.gone)")];
  enlarge(all[(all.indexOf(shown) + by + all.length) % all.length]);
}

dialog.addEventListener("click", (event) => {
  const by = event.target.dataset.step;
  if (by) step(Number(by));
  else if (event.target.tagName !== "IMG") dialog.close();
});
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
dialog.addEventListener("close", () => shown?.focus());

// --- light and dark ---

const root = document.documentElement;
const saved = localStorage.getItem("theme");
if (saved) root.dataset.theme = saved;
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
});
