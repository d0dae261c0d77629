// The page: images from files, the clipboard or the camera; classes as bars; attention or segmentation over the image.

import { decode, draw } from "./image.js";
import { Network, classify, segment } from "./network.js";

const TOP = 5; // classes
const FINE = 224; // input size in pixels with 7 x 7 image tokens, those of the paper
const MAGMA = [
  [0, 0, 4],
  [59, 15, 112],
  [140, 41, 129],
  [222, 73, 104],
  [254, 159, 109],
  [252, 253, 191],
];
const KEYS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** What the page shows: pixels of the image, results of the networks, row and column of the token. */
export const state = { pixels: null, result: null, segments: null, token: null, networks: {} };

const $ = (id) => document.getElementById(id);
const image = $("image");
const overlay = $("overlay");
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const tell = (message) => ($("message").textContent = message);

/** A new element with a text and a variable for its style. */
function make(tag, text, variable, value) {
  const element = Object.assign(document.createElement(tag), { textContent: text });
  if (variable) element.style.setProperty(variable, value);
  return element;
}

/** Runs the networks on the image. */
async function predict() {
  const { pixels, networks } = state;
  if (!pixels) return;
  const segmenting = $("show").value === "segmentation";
  try {
    const result = await classify(await networks.classifier.ready, pixels, Number($("size").value));
    if (segmenting) networks.segmenter ??= new Network(networks.about.segmenter);
    const segments = segmenting ? await segment(await networks.segmenter.ready, pixels) : null;
    if (pixels !== state.pixels) return; // another image came in between
    Object.assign(state, { result, segments });
  } catch (error) {
    return tell(`The network failed: ${error.message}. Reload the page or try a smaller image.`);
  }
  showClasses();
  showOverlay();
}

/** Shows an image, or a frame of the camera, and predicts. */
function take(source, width, height) {
  state.pixels = draw(source, width, height, image);
  overlay.width = 1024;
  overlay.height = Math.round((1024 * height) / width);
  image.hidden = overlay.hidden = false;
  $("hint").hidden = true;
  $("stage").style.setProperty("--ratio", width / height);
  $("stage").classList.remove("empty");
  return predict();
}

async function open(file) {
  if (!file) return;
  stopCamera();
  tell("");
  let bitmap;
  try {
    bitmap = await decode(file);
  } catch {
    return tell(`${file.name}: cannot be read as an image. Choose a JPEG, PNG or WebP file.`);
  }
  Object.assign(state, { result: null, segments: null, token: null });
  await take(bitmap, bitmap.width, bitmap.height);
  bitmap.close();
}

function showClasses() {
  const { probabilities } = state.result;
  const names = state.networks.about.classifier.class_names;
  const best = probabilities.map((share, label) => [share, label]).sort((a, b) => b[0] - a[0]);
  const rows = best.slice(0, TOP).map(([share, label]) => {
    const row = make("li", "", "--share", share);
    row.append(make("span", names[label]), make("span", percent(share)));
    return row;
  });
  $("classes").replaceChildren(...rows);
}

/** Width of a token and of the grid of global tokens, as shares of the square's side. */
function extent({ shape: [rows], size }) {
  const stride = 2 ** Math.ceil(Math.log2(size / rows)); // the last token may reach beyond the image
  return { cell: stride / size, grid: (rows * stride) / size };
}

/** Draws the attention of the token, or the segments, over the image, and describes what is shown. */
function showOverlay() {
  const context = overlay.getContext("2d");
  context.clearRect(0, 0, overlay.width, overlay.height);
  const segmenting = $("show").value === "segmentation";
  $("legend").hidden = !segmenting || !state.segments;
  $("scale").hidden = segmenting || !state.token;
  overlay.setAttribute("aria-label", segmenting ? "Segmentation of the image" : "Attention over the image");
  if (segmenting) return drawSegments(context);
  if (!state.token) {
    $("token").textContent = "Point at the image, or focus it and use the arrow keys, to see what a token attends to.";
    return;
  }
  drawAttention(context);
}

/** Draws colours (height * width) as an image that fills a rectangle from the origin. */
function paint(context, colours, [height, width], across, down) {
  const pixels = new ImageData(width, height);
  colours.forEach((rgb, index) => pixels.data.set([...rgb, 255], 4 * index));
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  context.drawImage(canvas, 0, 0, across, down);
}

function drawAttention(context) {
  const { maps, shape, place } = state.result;
  const [rows, columns, height, width] = shape;
  const [row, column] = state.token;
  const start = (row * columns + column) * height * width;
  const map = maps.slice(start, start + height * width);
  const low = Math.min(...map);
  const high = Math.max(...map);
  const { cell, grid } = extent(state.result);

  context.save();
  context.scale(overlay.width, overlay.height);
  context.fillStyle = "rgb(0 0 0 / 0.55)"; // outside of what the network sees
  context.fillRect(0, 0, 1, 1);
  context.translate(place.left, place.top);
  context.scale(place.width, place.height);
  context.beginPath();
  context.rect(0, 0, 1, 1);
  context.clip();
  context.clearRect(0, 0, 1, 1);
  context.globalAlpha = 0.6;
  const colours = Array.from(map, (value) => colour((value - low) / (high - low || 1)));
  paint(context, colours, [height, width], grid, grid);
  context.globalAlpha = 1;
  for (const [style, line] of [
    ["black", 0.014],
    ["white", 0.007],
  ]) {
    context.strokeStyle = style;
    context.lineWidth = line;
    const [x, y] = [column * cell, row * cell];
    context.strokeRect(x + 0.007, y + 0.007, Math.min(cell, 1 - x) - 0.014, Math.min(cell, 1 - y) - 0.014);
  }
  context.restore();

  $("token").textContent =
    `Token in row ${row + 1} of ${rows}, column ${column + 1} of ${columns}: its attention to the ` +
    `${height} × ${width} global tokens. Evenly spread it would be ${percent(1 / (height * width))} each.`;
  $("low").textContent = percent(low);
  $("high").textContent = percent(high);
}

/** A colour of the scale for a value between 0 and 1. */
function colour(value) {
  const place = value * (MAGMA.length - 1);
  const index = Math.min(Math.floor(place), MAGMA.length - 2);
  return MAGMA[index].map((part, c) => part + (place - index) * (MAGMA[index + 1][c] - part));
}

function drawSegments(context) {
  $("token").textContent = state.segments ? "The class of every pixel." : "";
  if (!state.segments) return;
  const { labels, size } = state.segments;
  const { class_names: names, colours } = state.networks.about.segmenter;
  context.globalAlpha = 0.55;
  paint(
    context,
    Array.from(labels, (label) => colours[label]),
    size,
    overlay.width,
    overlay.height,
  );
  context.globalAlpha = 1;
  const found = [...new Set(labels)].sort((a, b) => a - b);
  const rows = found.map((label) => make("li", names[label], "--colour", `rgb(${colours[label]})`));
  $("legend").replaceChildren(...rows);
}

/** Shows the token under the pointer, or none. */
function point(event) {
  if (!state.result || $("show").value === "segmentation") return;
  const { shape, place } = state.result;
  const { left, top, width, height } = overlay.getBoundingClientRect();
  const x = ((event.clientX - left) / width - place.left) / place.width;
  const y = ((event.clientY - top) / height - place.top) / place.height;
  const inside = x >= 0 && y >= 0 && x < 1 && y < 1;
  const { cell } = extent(state.result);
  state.token = inside ? [y, x].map((share, axis) => Math.min(Math.floor(share / cell), shape[axis] - 1)) : null;
  showOverlay();
}

function move(event) {
  if (!state.result || $("show").value === "segmentation") return;
  const centre = state.result.shape.slice(0, 2).map((count) => count >> 1);
  if (event.key === "Escape") state.token = null;
  else if (event.type === "focus") state.token ??= centre;
  else if (KEYS[event.key])
    state.token = (state.token ?? centre).map((place, axis) =>
      Math.min(Math.max(place + KEYS[event.key][axis], 0), state.result.shape[axis] - 1),
    );
  else return;
  event.preventDefault();
  showOverlay();
}

function leave(event) {
  if (event.pointerType === "mouse" && document.activeElement !== overlay) {
    state.token = null;
    showOverlay();
  }
}

let stream = null;

async function startCamera() {
  tell("");
  $("camera").disabled = true;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    return tell(`The camera cannot be used (${error.message}). Allow it in the browser, or choose an image.`);
  } finally {
    $("camera").disabled = false;
  }
  const video = Object.assign(document.createElement("video"), { srcObject: stream, muted: true, playsInline: true });
  $("camera").textContent = "Stop the camera";
  $("camera").ariaPressed = "true";
  $("classes").ariaLive = "off"; // it changes too often to be read aloud
  await video.play();
  while (stream) {
    await take(video, video.videoWidth, video.videoHeight);
    await new Promise(requestAnimationFrame);
  }
}

/** Stops the camera; its last image stays. */
function stopCamera() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  $("camera").textContent = "Use the camera";
  $("camera").ariaPressed = "false";
  $("classes").ariaLive = "polite";
}

function listen() {
  $("file").addEventListener("change", ({ target }) => open(target.files[0]).then(() => (target.value = "")));
  $("camera").addEventListener("click", () => (stream ? stopCamera() : startCamera()));
  addEventListener("paste", ({ clipboardData }) => open(clipboardData.files[0]));
  for (const type of ["dragover", "dragleave", "drop"])
    addEventListener(type, (event) => {
      event.preventDefault();
      $("stage").classList.toggle("over", type === "dragover");
      if (type === "drop") open(event.dataTransfer.files[0]);
    });
  for (const type of ["pointermove", "pointerdown"]) overlay.addEventListener(type, point);
  for (const type of ["focus", "keydown"]) overlay.addEventListener(type, move);
  overlay.addEventListener("pointerleave", leave);
  for (const id of ["show", "size"])
    $(id).addEventListener("change", () => {
      Object.assign(state, { token: null, segments: null });
      predict();
    });
}

async function start() {
  $("stage").classList.add("empty");
  const response = await fetch("networks.json");
  const about = await response.json();
  const { classifier, segmenter } = about;
  for (const size of new Set([classifier.image_size, Math.max(classifier.image_size, FINE)])) {
    const note = size === classifier.image_size ? "as trained" : "finer maps";
    $("size").append(new Option(`${size} px, ${note}`, size));
  }
  $("overlays").hidden = !segmenter;
  $("names").textContent = classifier.class_names.join(", ");
  const top1 = classifier.top1 === null ? "" : `, right for ${percent(classifier.top1)} of its validation images`;
  $("about").textContent =
    `The network is ${classifier.model} (${classifier.precision}, ${(classifier.bytes / 1e6).toFixed(1)} MB). It knows ` +
    `${classifier.class_names.length} classes, listed below${top1}.` +
    (classifier.license ? ` Licence of its weights: ${classifier.license.toUpperCase()}.` : "");
  state.networks = { about, classifier: new Network(classifier) };
  listen();
  await state.networks.classifier.ready;
  $("status").textContent = "Ready.";
  try {
    await navigator.serviceWorker.register("sw.js");
    await navigator.serviceWorker.ready;
    $("status").textContent = "Ready, also offline.";
  } catch {
    // Private windows and insecure addresses have no service workers.
  }
}

start().catch((error) => {
  $("status").textContent = "";
  tell(`The network could not be loaded (${error.message}). Reload the page.`);
});
