// Keeps all files of the page, so that it works without a network.

importScripts("files.js"); // VERSION and FILES, written by build_page.py

const PREFIX = `dualtoken-vit ${self.registration.scope} `; // other pages of the same host have caches, too
const NAME = PREFIX + VERSION;

self.addEventListener("install", (event) => {
  const requests = FILES.map((file) => new Request(file, { cache: "no-cache" }));
  event.waitUntil(caches.open(NAME).then((cache) => cache.addAll(requests)));
});

self.addEventListener("activate", (event) => {
  const old = async (name) => name.startsWith(PREFIX) && name !== NAME && caches.delete(name);
  event.waitUntil(
    caches
      .keys()
      .then((names) => Promise.all(names.map(old)))
      .then(() => self.clients.claim()),
  );
});

self.addEventListener("fetch", (event) => {
  const found = caches.open(NAME).then((cache) => cache.match(event.request, { ignoreSearch: true }));
  event.respondWith(found.then((response) => response ?? fetch(event.request)));
});
