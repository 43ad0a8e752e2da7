// Keeps the page live: fetches it again every few seconds and puts the new main part in place, unless somebody is at
// work in a form, and only while the page is looked at. Without this script a browser reloads the page by itself.
"use strict";
setInterval(async () => {
  const at = document.activeElement;
  const busy = (at && at.closest && at.closest("form")) || document.querySelector("main details[open]");
  if (document.hidden || busy) return;
  try {
    const answer = await fetch(location.pathname + location.search, { cache: "no-store" });
    if (!answer.ok) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    // Whoever walks through the page with the keyboard stays where they are.
    const where = at && at.closest("main") && at.getAttribute("href");
    for (const what of ["main", "header .when"]) {
      document.querySelector(what).replaceChildren(...page.querySelector(what).childNodes);
    }
    if (where) {
      for (const link of document.querySelectorAll("main a")) {
        if (link.getAttribute("href") === where) { link.focus({ preventScroll: true }); break; }
      }
    }
    document.title = page.title;
  } catch { /* the server is away: the page keeps what it has */ }
}, 4000);
