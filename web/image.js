// Images as dualtoken_vit/runtime/classification.py prepares them: Pillow's resampling, bit by bit.

const MOST = 2 ** 22; // pixels: larger images take a phone too long, and memory
const FILTERS = {
  bilinear: [1, (x) => Math.max(1 - x, 0)],
  bicubic: [2, (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0)],
};
const BITS = 22; // of the fixed-point weights with which Pillow resizes 8-bit images

/** The image in a file, upright; rejects what the browser cannot decode. */
export const decode = (file) => createImageBitmap(file, { colorSpaceConversion: "none" });

/** Draws an image or a frame of the camera on white into a canvas, which takes its size; returns its pixels. */
export function draw(source, width, height, canvas) {
  const scale = Math.min(1, Math.sqrt(MOST / (width * height)));
  canvas.width = Math.floor(width * scale);
  canvas.height = Math.floor(height * scale);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

/** For each of `size` new positions along an axis of `length`: the first old position and the weights from there. */
function windows(length, size, [support, filter]) {
  const scale = length / size;
  const stretch = Math.max(scale, 1); // antialiasing
  return Array.from({ length: size }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support * stretch + 0.5), 0);
    const end = Math.min(Math.trunc(centre + support * stretch + 0.5), length);
    const weights = Array.from({ length: end - first }, (_, k) =>
      filter(Math.abs((k + first - centre + 0.5) * (1 / stretch))),
    );
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    return [first, weights.map((weight) => weight / total)];
  });
}

/** Resizes the middle axis of an array (outer, length, inner). 8-bit values are rounded and clamped as in Pillow. */
function resample(values, outer, length, inner, size, filter) {
  const bytes = values instanceof Uint8ClampedArray;
  const result = new values.constructor(outer * size * inner);
  windows(length, size, filter).forEach(([first, shares], place) => {
    const weights = bytes ? shares.map((w) => Math.trunc(w * 2 ** BITS + Math.sign(w) * 0.5)) : shares;
    for (let row = 0; row < outer; row++) {
      const from = (row * length + first) * inner;
      const to = (row * size + place) * inner;
      for (let i = 0; i < inner; i++) {
        let sum = bytes ? 2 ** (BITS - 1) : 0;
        for (let k = 0; k < weights.length; k++) sum += weights[k] * values[from + k * inner + i];
        result[to + i] = bytes ? sum >> BITS : sum;
      }
    }
  });
  return result;
}

/** Resizes RGBA pixels (height, width, 4), each row before each column, or in very tall images after (Pillow 13). */
function resize(values, [height, width], [newHeight, newWidth], filter) {
  const rows = (some, count) => (width === newWidth ? some : resample(some, count, width, 4, newWidth, filter));
  const columns = (some, count) =>
    height === newHeight ? some : resample(some, 1, height, 4 * count, newHeight, filter);
  const tall = height > 2 * width && newHeight < height;
  return tall ? rows(columns(values, width), newHeight) : columns(rows(values, height), newWidth);
}

/** A part of RGBA pixels as a network's input (3, height, width), divided by `scale`. */
function planes(values, width, left, top, [newHeight, newWidth], scale) {
  const result = new Float32Array(3 * newHeight * newWidth);
  for (let c = 0, to = 0; c < 3; c++)
    for (let y = 0; y < newHeight; y++)
      for (let x = 0; x < newWidth; x++) result[to++] = values[((y + top) * width + x + left) * 4 + c] / scale;
  return result;
}

/** Python's round: halves to the even number. */
const round = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

/** The square that a classifier sees: its input (3, size, size), and the square's place as shares of the image. */
export function square({ data, width, height }, { image_size: size, crop_pct, interpolation }) {
  const short = Math.floor(size / crop_pct);
  const least = Math.min(width, height);
  const [newWidth, newHeight] = [width, height].map((side) => Math.floor((short * side) / least));
  const [left, top] = [newWidth, newHeight].map((side) => round((side - size) / 2));
  const values = resize(data, [height, width], [newHeight, newWidth], FILTERS[interpolation]);
  return {
    input: planes(values, newWidth, left, top, [size, size], 255),
    place: { left: left / newWidth, top: top / newHeight, width: size / newWidth, height: size / newHeight },
  };
}

/** The input of a segmenter (3, height, width), whose short side is `image_size`, or as it is; `most` limits the long. */
export function whole({ data, width, height }, { image_size }, most) {
  const scale = Math.min(
    (image_size ?? Math.min(width, height)) / Math.min(width, height),
    most / Math.max(width, height),
  );
  const size = [height, width].map((side) => Math.max(32, round(side * scale)));
  const values = resize(
    Float32Array.from(data, (value) => value / 255),
    [height, width],
    size,
    FILTERS.bilinear,
  );
  return { input: planes(values, size[1], 0, 0, size, 1), size };
}
