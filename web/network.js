// Exported networks in ONNX Runtime Web.

import * as ort from "./ort/ort.wasm.bundle.min.mjs";
import { square, whole } from "./image.js";

const LONG_SIDE = 768; // pixels: larger images take seconds to segment

ort.env.wasm.numThreads = 1; // more need headers that plain web space does not send
ort.env.wasm.wasmPaths = { wasm: new URL("ort/ort-wasm-simd-threaded.wasm", import.meta.url).href };

/** A network that build_page.py has exported, as described in networks.json. */
export class Network {
  #session;
  #last = Promise.resolve();

  constructor(about) {
    this.about = about;
    this.#session = ort.InferenceSession.create(about.file);
    this.ready = this.#session.then(() => this);
  }

  /** The outputs for one image (3, height, width) by name; calls run one after the other. */
  run(input, [height, width]) {
    const job = async () =>
      (await this.#session).run({ image: new ort.Tensor("float32", input, [1, 3, height, width]) });
    return (this.#last = this.#last.then(job, job));
  }
}

/**
 * Probabilities of the classes; maps (rows, columns, height, width), the attention of each image token to the grid of
 * global tokens; the place of the network's square input in the image.
 */
export async function classify(network, pixels, size) {
  const { input, place } = square(pixels, { ...network.about, image_size: size });
  const { logits, attention } = await network.run(input, [size, size]);
  const scaled = Array.from(logits.data, (logit) => logit / network.about.temperature);
  const highest = Math.max(...scaled);
  const shares = scaled.map((logit) => Math.exp(logit - highest));
  const total = shares.reduce((sum, share) => sum + share, 0);
  return {
    probabilities: shares.map((share) => share / total),
    maps: attention.data,
    shape: attention.dims.slice(1),
    place,
    size,
  };
}

/** The class of every pixel, at the size (height, width) of the network's input. */
export async function segment(network, pixels) {
  const { input, size } = whole(pixels, network.about, LONG_SIDE);
  const { data } = (await network.run(input, size)).logits;
  const count = size[0] * size[1];
  const labels = new Uint8Array(count);
  for (let pixel = 0; pixel < count; pixel++)
    for (let label = 1; label < network.about.class_names.length; label++)
      if (data[label * count + pixel] > data[labels[pixel] * count + pixel]) labels[pixel] = label;
  return { labels, size };
}
