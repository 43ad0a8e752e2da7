// Keeps the page live: fetches it again every few seconds and puts the new main part in place, unless somebody is
// typing, and only while the page is looked at. Without this script a browser reloads the page by itself.
"use strict";
setInterval(async () => {
  const typing = document.activeElement && document.activeElement.tagName === "INPUT";
  if (document.hidden || typing) return;
  try {
    const answer = await fetch(location.pathname + location.search, { cache: "no-store" });
    if (!answer.ok) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const what of ["main", "header .when"]) {
      document.querySelector(what).replaceChildren(...page.querySelector(what).childNodes);
    }
    document.title = page.title;
  } catch { /* the server is away: the page keeps what it has */ }
}, 4000);
