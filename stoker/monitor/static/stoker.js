// Stoker's page: asks for what there is every two seconds while the page can be seen, and changes only what changed.
// Everything is set as text, never as HTML: names and messages come from clients.
(function () {
  "use strict";

  var root = document.getElementById("stoker");
  var address = root.dataset.address;
  var EVERY = 2000;

  function make(name, className, text) {
    var node = document.createElement(name);
    if (className) { node.className = className; }
    if (text !== undefined) { node.textContent = text; }
    return node;
  }

  function say(node, text) {
    if (node.textContent !== String(text)) { node.textContent = text; }
  }

  function seconds(value) {
    if (value < 60) { return value.toFixed(0) + " s"; }
    if (value < 3600) { return Math.floor(value / 60) + " min " + Math.floor(value % 60) + " s"; }
    return Math.floor(value / 3600) + " h " + Math.floor(value % 3600 / 60) + " min";
  }

  // One child of `parent` for each item, kept by its key, so that a button stays where a finger is on its way to.
  function keyed(parent, items, key, build, update) {
    var there = new Map();
    Array.from(parent.children).forEach(function (node) { there.set(node.dataset.key, node); });
    items.forEach(function (item, index) {
      var name = key(item), node = there.get(name);
      if (!node) {
        node = build(item);
        node.dataset.key = name;
      }
      there.delete(name);
      if (parent.children[index] !== node) { parent.insertBefore(node, parent.children[index] || null); }
      update(node, item);
    });
    there.forEach(function (node) { node.remove(); });
  }

  function button(text, verb, target, model, className) {
    var node = make("button", className, text);
    node.type = "button";
    node.dataset.verb = verb;
    node.dataset.target = target;
    if (model) { node.dataset.model = model; }
    node.setAttribute("aria-label", text + " " + target);
    return node;
  }

  function row(columns) {
    var node = make("tr");
    for (var i = 0; i < columns; i += 1) { node.appendChild(make("td")); }
    return node;
  }

  function cells(node, texts) {
    texts.forEach(function (text, index) {
      if (text !== null) { say(node.children[index], text); }
    });
  }

  function byId(item) { return item.id; }

  function body(id) { return document.querySelector("#" + id + " tbody"); }

  function showQueues(queues) {
    keyed(body("queues"), queues, function (queue) { return queue.name; }, function () { return row(7); }, function (node, queue) {
      cells(node, [queue.name, queue.waiting, queue.running, queue.waiting ? seconds(queue.oldest) : "",
        queue.waiting ? queue.by_priority.join(" ") : "",
        queue.waiting ? "<10 s: " + queue.by_age[0] + ", <1 min: " + queue.by_age[1] + ", <10 min: " + queue.by_age[2] + ", more: " + queue.by_age[3] : "",
        queue.clients.map(function (share) { return share.client + ": " + share.waiting + ", " + share.running; }).join("; ")]);
    });
  }

  function job(item, columns) {
    var node = row(columns), link = make("a", "id", item.id);
    link.href = "/task/" + encodeURIComponent(item.id);
    node.children[0].appendChild(link);
    node.children[columns - 1].appendChild(button("Cancel", "cancel", item.id, "", "danger"));
    return node;
  }

  function model(item) { return item.model + (item.adapter ? " + " + item.adapter : ""); }

  function bar(share) {
    var node = make("progress");
    node.max = 1;
    node.value = share;
    return node;
  }

  function showRunning(jobs) {
    keyed(body("running"), jobs, byId, function (item) {
      var node = job(item, 8);
      node.children[5].appendChild(bar(0));
      node.children[5].appendChild(make("span"));
      return node;
    }, function (node, item) {
      cells(node, [null, item.kind, model(item), item.client, seconds(item.age), null, item.worker]);
      var shown = node.querySelector("progress");
      if (item.share === null) { shown.removeAttribute("value"); } else { shown.value = item.share; }
      say(node.children[5].lastChild, item.text || item.size);
    });
  }

  function showWaiting(jobs, all) {
    say(document.getElementById("waiting-count"), all > jobs.length ? "the first " + jobs.length + " of " + all : all);
    keyed(body("waiting"), jobs, byId, function (item) { return job(item, 8); }, function (node, item) {
      cells(node, [null, item.kind, model(item), item.client, item.priority, item.size, seconds(item.age)]);
    });
  }

  var SVG = "http://www.w3.org/2000/svg";

  function drawn(name, attributes, text) {
    var node = document.createElementNS(SVG, name);
    Object.keys(attributes).forEach(function (key) { node.setAttribute(key, attributes[key]); });
    if (text !== undefined) { node.textContent = text; }
    return node;
  }

  function path(points, x, y) {
    return points.map(function (point) { return x(point[0]).toFixed(1) + "," + y(point[1]).toFixed(1); }).join(" ");
  }

  // Losses by step: the axes end at the least and the greatest.
  function curve(run) {
    var all = run.points.concat(run.held_out), losses = all.map(function (point) { return point[1]; });
    var steps = all.map(function (point) { return point[0]; });
    var low = Math.min.apply(null, losses), high = Math.max.apply(null, losses), first = Math.min.apply(null, steps), last = Math.max.apply(null, steps);
    var x = function (step) { return 34 + 262 * (step - first) / Math.max(1, last - first); };
    var y = function (loss) { return 8 + 78 * (high - loss) / Math.max(1e-9, high - low); };
    var svg = drawn("svg", {viewBox: "0 0 300 100", role: "img",
      "aria-label": "loss " + high.toFixed(2) + " to " + low.toFixed(2) + ", steps " + first + " to " + last, "data-points": run.points.length});
    svg.appendChild(drawn("text", {x: 2, y: 12}, high.toFixed(2)));
    svg.appendChild(drawn("text", {x: 2, y: 88}, low.toFixed(2)));
    svg.appendChild(drawn("text", {x: 34, y: 98}, first));
    svg.appendChild(drawn("text", {x: 296, y: 98, "text-anchor": "end"}, last));
    svg.appendChild(drawn("polyline", {"class": "loss", points: path(run.points, x, y)}));
    if (run.held_out.length) { svg.appendChild(drawn("polyline", {"class": "held", points: path(run.held_out, x, y)})); }
    return svg;
  }

  function showRuns(runs) {
    keyed(document.getElementById("runs"), runs, byId, function (run) {
      var node = make("article", "stoker-card");
      node.appendChild(make("h3", "", run.name + " on " + run.model));
      node.appendChild(make("p", "id quiet", run.id));
      node.appendChild(make("p"));
      node.appendChild(bar(0));
      node.appendChild(make("div"));
      node.appendChild(button("Cancel", "cancel", run.id, "", "danger"));
      return node;
    }, function (node, run) {
      say(node.children[2], (run.text || "no step yet") + (run.running ? "" : " · ended"));
      node.children[3].value = run.share;
      if (run.points.length) { node.children[4].replaceChildren(curve(run)); }
      node.children[5].hidden = !run.running;
    });
  }

  function showWorkers(workers) {
    keyed(document.getElementById("workers"), workers, byId, function (worker) {
      var node = make("article", "stoker-card");
      node.appendChild(make("h3", "", worker.node));
      for (var i = 0; i < 6; i += 1) { node.appendChild(make("p")); }
      return node;
    }, function (node, worker) {
      var lanes = worker.lanes.map(function (lane) { return lane.kind + " " + lane.held + "/" + lane.limit; }).join(", ");
      [worker.device + ", up " + seconds(worker.up) + ", " + (worker.memory_bytes / 1048576).toFixed(0) + " MB",
        worker.models.join("; "), "lanes: " + lanes, worker.tokens_per_second.toFixed(0) + " tokens/s",
        worker.adapters.length ? "adapters in memory: " + worker.adapters.join(", ") : "",
        worker.prefixes.length ? "pinned prefixes: " + worker.prefixes.join(", ") : ""].forEach(function (text, index) {
        say(node.children[index + 1], text);
      });
    });
  }

  function showAdapters(adapters) {
    keyed(body("adapters"), adapters, byId, function () { return row(4); }, function (node, adapter) {
      cells(node, [adapter.name, adapter.model]);
      keyed(node.children[2], adapter.versions, function (version) { return String(version.number); }, function (version) {
        var line = make("div");
        line.appendChild(make("span"));
        line.appendChild(document.createTextNode(" "));
        line.appendChild(button("Promote", "promote", adapter.name + "@" + version.number, adapter.model));
        return line;
      }, function (line, version) {
        say(line.firstChild, version.number + ": " + version.facts + (version.serves ? " · serves" : ""));
        line.lastChild.hidden = version.serves;
      });
      keyed(node.children[3], adapter.can_roll_back ? [adapter] : [], byId, function () {
        var holder = make("div");
        holder.appendChild(button("Roll back", "rollback", adapter.name, adapter.model));
        return holder;
      }, function () {});
    });
  }

  function showDead(letters) {
    keyed(body("dead"), letters, byId, function (letter) {
      var node = row(6);
      if (letter.can_retry) { node.children[5].appendChild(button("Retry", "retry", letter.id)); }
      return node;
    }, function (node, letter) {
      cells(node, [letter.id, letter.kind, letter.model, letter.client, letter.history.join("; ")]);
    });
  }

  function trouble(text) {
    var node = document.getElementById("trouble");
    node.hidden = !text;
    say(node, text);
  }

  function show(seen) {
    trouble(seen.trouble);
    showQueues(seen.queues);
    showRunning(seen.running);
    showWaiting(seen.waiting, seen.waiting_in_all);
    showRuns(seen.runs);
    showWorkers(seen.workers);
    showAdapters(seen.adapters);
    showDead(seen.dead);
    root.dataset.loaded = "yes";
  }

  function look() {
    if (document.hidden) { return Promise.resolve(); }
    return fetch(address + "/data", {credentials: "same-origin"}).then(function (reply) {
      if (!reply.ok) { throw new Error("the monitor answers with " + reply.status); }
      return reply.json();
    }).then(show).catch(function (error) { trouble("Not up to date: " + error.message); });
  }

  function again() { look().then(function () { setTimeout(again, EVERY); }); }

  function said(text, failed) {
    var node = document.getElementById("said");
    node.hidden = false;
    node.toggleAttribute("data-failed", failed);
    node.textContent = text;
  }

  root.addEventListener("click", function (event) {
    var pressed = event.target.closest("button[data-verb]");
    if (!pressed) { return; }
    pressed.disabled = true;
    var asked = new URLSearchParams({target: pressed.dataset.target});
    if (pressed.dataset.model) { asked.set("model", pressed.dataset.model); }
    fetch(address + "/" + pressed.dataset.verb, {method: "POST", body: asked, credentials: "same-origin"}).then(function (reply) {
      return reply.text().then(function (text) { said(reply.ok ? JSON.parse(text).message : text, !reply.ok); });
    }).catch(function (error) { said(error.message, true); }).then(function () {
      pressed.disabled = false;
      return look();
    });
  });

  document.addEventListener("visibilitychange", look);
  again();
}());
