// What only the browser knows: the viewer's zone and wish for light or dark, and whether the server is there.
(() => {
  "use strict";

  // --- light and dark -------------------------------------------------------------------------------------------
  const THEMES = ["auto", "light", "dark"];
  const THEME_WORDS = { auto: "as the system", light: "light", dark: "dark" };
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");

  const storedTheme = () => {
    try {
      const stored = localStorage.getItem("glora-theme");
      return THEMES.includes(stored) ? stored : "auto";
    } catch {
      return "auto"; // a browser that keeps nothing
    }
  };

  function applyTheme() {
    const theme = storedTheme();
    const dark = theme === "dark" || (theme === "auto" && prefersDark.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    document.getElementById("nicegui-color-scheme")?.setAttribute("content", dark ? "dark" : "light");
    globalThis.Quasar?.Dark?.set(dark);
    for (const button of document.querySelectorAll("[data-theme-button]")) labelThemeButton(button);
  }

  function labelThemeButton(button) {
    const label = `Colours: ${THEME_WORDS[storedTheme()]}. Change`;
    button.setAttribute("aria-label", label);
    button.title = label;
    button.dataset.choice = storedTheme();
  }

  function nextTheme() {
    const theme = THEMES[(THEMES.indexOf(storedTheme()) + 1) % THEMES.length];
    try {
      localStorage.setItem("glora-theme", theme);
    } catch {
      /* then it lasts as long as the page */
    }
    applyTheme();
  }

  prefersDark.addEventListener("change", applyTheme);
  applyTheme();

  // --- times ----------------------------------------------------------------------------------------------------
  // The server's clock counts: a viewer's own may be wrong.
  const serverNow = Number(document.querySelector('meta[name="glora-now"]')?.content ?? NaN);
  const skew = Number.isFinite(serverNow) ? serverNow - Date.now() / 1000 : 0;
  const now = () => Date.now() / 1000 + skew;

  function spanText(seconds) {
    const whole = Math.max(0, Math.round(seconds));
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)} min`;
    if (whole < 86400) {
      const minutes = Math.floor((whole % 3600) / 60);
      if (whole >= 36000) return `${Math.round(whole / 3600)} h`;
      return `${Math.floor(whole / 3600)} h${minutes ? ` ${minutes} min` : ""}`;
    }
    const days = Math.floor(whole / 86400);
    return days < 730 ? `${days} d` : `${Math.floor(days / 365)} years`;
  }

  function clockText(at) {
    const date = new Date(at * 1000);
    const clock = date.toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
    if (date.toDateString() === new Date(now() * 1000).toDateString()) return clock;
    return `${date.toLocaleDateString(undefined, { day: "numeric", month: "short" })}, ${clock}`;
  }

  function timeText(at, mode) {
    const age = now() - at;
    switch (mode) {
      case "time":
        return clockText(at);
      case "until":
        return age > 0 ? "now" : spanText(-age);
      case "since":
        return spanText(age);
      default:
        if (age < -1) return `in ${spanText(-age)}`;
        return age < 3 ? "just now" : `${spanText(age)} ago`;
    }
  }

  class Time extends HTMLElement {
    static observedAttributes = ["at", "mode"];
    connectedCallback() {
      this.show();
    }
    attributeChangedCallback() {
      this.show();
    }
    show() {
      const at = Number(this.getAttribute("at"));
      if (!this.isConnected || !Number.isFinite(at)) return;
      const text = timeText(at, this.getAttribute("mode"));
      if (text === this.textContent) return;
      this.textContent = text;
      this.title = new Date(at * 1000).toLocaleString(undefined, { dateStyle: "full", timeStyle: "long" });
    }
  }
  customElements.define("g-time", Time);
  setInterval(() => document.querySelectorAll("g-time").forEach((time) => time.show()), 1000);

  // --- connection -----------------------------------------------------------------------------------------------
  const LOST = "glora-connection-lost";
  const WORDS = { live: "Live", lost: "Connection lost, trying again", joining: "Connecting" };
  let lostAt = null;

  class Connection extends HTMLElement {
    connectedCallback() {
      this.setAttribute("role", "status");
      this.show(globalThis.socket?.connected ? "live" : "joining");
    }
    show(state) {
      if (this.dataset.state === state) return;
      this.dataset.state = state;
      this.title = WORDS[state];
      this.innerHTML = `<span class="g-dot" aria-hidden="true"></span><span class="g-word">${WORDS[state]}</span>`;
    }
  }
  customElements.define("g-connection", Connection);

  function showConnection(state) {
    document.querySelectorAll("g-connection").forEach((element) => element.show(state));
    document.body?.classList.toggle("connection-lost", state === "lost");
  }

  // A page whose server was restarted is loaded anew by NiceGUI; afterwards it says why.
  function tellOfReturn() {
    let lost = null;
    try {
      lost = sessionStorage.getItem(LOST);
      sessionStorage.removeItem(LOST);
    } catch {
      return;
    }
    if (lost === null) return;
    const text = "Connected again. This page shows the present state.";
    globalThis.Quasar?.Notify?.create({ message: text, type: "info", timeout: 6000, attrs: { role: "status" } });
  }

  function watchSocket() {
    const socket = globalThis.socket;
    if (!socket) {
      setTimeout(watchSocket, 50);
      return;
    }
    const live = () => {
      lostAt = null;
      showConnection("live");
      tellOfReturn();
    };
    if (socket.connected) live();
    socket.on("connect", live);
    socket.on("disconnect", () => {
      lostAt = Date.now();
      try {
        sessionStorage.setItem(LOST, String(lostAt));
      } catch {
        /* then it will not say that it was away */
      }
      showConnection("lost");
      askToSignIn();
    });
  }

  // Until it has connected NiceGUI keeps what is typed with a timer for each key, which can change their order: the
  // server would have another text than the field shows. So it is told at once that it has, and the socket keeps its
  // messages in order. Not on pages that were loaded ahead of a visit: they greet the server before anything else.
  let greeted = false;
  Object.defineProperty(globalThis, "did_handshake", {
    get: () => greeted || globalThis.socket?.io?.opts?.query?.implicit_handshake === true,
    set: (value) => {
      greeted = value;
    },
  });

  // The server cuts the socket of those whose session has ended: the login page says so at once.
  async function askToSignIn() {
    try {
      const answer = await fetch("/api/v1/me", { cache: "no-store" });
      if (answer.status === 401) location.reload();
    } catch {
      /* it is away */
    }
  }

  // The server answers, but takes no socket of this page: loading it anew says why.
  async function probe() {
    if (lostAt !== null && Date.now() - lostAt > 8000) {
      try {
        const answer = await fetch("/healthz", { cache: "no-store" });
        if (answer.ok && !globalThis.socket?.connected) {
          lostAt = Date.now();
          location.reload();
        }
      } catch {
        /* it is still away */
      }
    }
    setTimeout(probe, 4000);
  }

  // On a phone the navigation is wider than the screen; NiceGUI draws it after the document was loaded.
  function showPlace() {
    const here = document.querySelector(".nav [aria-current]");
    if (here) here.scrollIntoView({ inline: "center", block: "nearest" });
    else if (!document.querySelector(".nav")) setTimeout(showPlace, 50);
  }

  document.addEventListener("DOMContentLoaded", () => {
    applyTheme();
    document.getElementById("popup")?.setAttribute("role", "alert");
    showPlace();
    watchSocket();
    probe();
  });

  globalThis.glora = { applyTheme, nextTheme };
})();
