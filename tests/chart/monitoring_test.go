package charttest

import (
	"encoding/json"
	"net"
	"regexp"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/promql/promqltest"
	"sigs.k8s.io/yaml"
)

// One job that ends, with a request that fails, and one that never ends.
const jobs = `
apiVersion: v1
kind: Secret
metadata: { name: gemini }
stringData: { apiKey: key-for-tests }
---
apiVersion: geminibatch.dev/v1alpha1
kind: GeminiBatchJob
metadata: { name: metrics }
spec:
  model: gemini-2.5-flash
  credentials: { secretRef: { name: gemini } }
  input:
    requests:
      - { key: a, prompt: a }
      - { key: b, prompt: "b [[sim:error=3]]" }
---
apiVersion: geminibatch.dev/v1alpha1
kind: GeminiBatchJob
metadata: { name: endless }
spec:
  model: gemini-2.5-flash
  credentials: { secretRef: { name: gemini } }
  input:
    requests: [{ key: a, prompt: "a [[sim:work=1000000]]" }]
`

// families are the metrics that a running operator exports, with their type. Those with labels appear when they are
// counted for the first time, so jobs are run, and the receiver sees a connection that is no HTTP.
func families(t *testing.T) map[string]string {
	t.Helper()
	sim, listen, controller, receiver := freeAddress(t), freeAddress(t), freeAddress(t), freeAddress(t)
	start(t, "http://"+sim+"/_sim/healthz", simulatorBin, "--listen", sim, "--speed", "50")
	operator := func(role, admin string) {
		start(t, "http://"+admin+"/readyz", operatorBin, "run", "--role", role, "--namespace", namespace,
			"--admin-listen", admin, "--listen", listen, "--external-url", "http://"+listen, "--allow-insecure-callbacks",
			"--gemini-base-url", "http://"+sim, "--allow-insecure-upstream")
	}
	// The controller first: it makes the key ring, without which a receiver is not ready.
	operator("controller", controller)
	operator("receiver", receiver)
	apply := kubectl("apply", "--namespace", namespace, "-f", "-")
	apply.Stdin = strings.NewReader(jobs)
	if _, err := output(apply); err != nil {
		t.Fatal(err)
	}
	connection, err := net.Dial("tcp", listen)
	if err != nil {
		t.Fatal(err)
	}
	defer connection.Close()
	if _, err := connection.Write([]byte("no HTTP\r\n\r\n")); err != nil {
		t.Fatal(err)
	}

	has := func(sample string) func(string) bool {
		return func(text string) bool { return strings.Contains(text, "\n"+sample) }
	}
	worked := func(text string) bool {
		return has(`gemini_batch_ends_learned_total{by="callback"} 1`)(text) && has("gemini_batch_active_batches{")(text)
	}
	texts := []string{
		eventually(t, "http://"+controller+"/metrics", worked),
		eventually(t, "http://"+receiver+"/metrics", has("gemini_batch_receiver_connections_rejected_total{")),
	}
	found := map[string]string{}
	for _, line := range strings.Split(strings.Join(texts, "\n"), "\n") {
		if fields := strings.Fields(line); len(fields) == 4 && fields[1] == "TYPE" {
			found[fields[2]] = fields[3]
		}
	}
	if len(found) < 40 {
		t.Fatalf("only %d metrics: %v", len(found), found)
	}
	return found
}

// names are what Prometheus stores of the families.
func names(families map[string]string) map[string]bool {
	stored := map[string]bool{}
	for family, kind := range families {
		switch kind {
		case "counter":
			stored[family+"_total"] = true
		case "histogram":
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				stored[family+suffix] = true
			}
		default:
			stored[family] = true
		}
	}
	return stored
}

// rules are the alerts as they are installed. What Prometheus reads is the object's spec.
func rules(t *testing.T, args ...string) []rulefmt.Rule {
	t.Helper()
	rendered := template(t, append([]string{reachable, "--set", "monitoring.prometheusRule.enabled=true", "--show-only",
		"templates/monitoring/prometheusrule.yaml"}, args...)...)
	var object struct {
		Spec json.RawMessage `json:"spec"`
	}
	if err := yaml.Unmarshal([]byte(rendered), &object); err != nil {
		t.Fatal(err)
	}
	groups, errs := rulefmt.Parse(object.Spec, false, model.UTF8Validation)
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	var all []rulefmt.Rule
	for _, group := range groups.Groups {
		all = append(all, group.Rules...)
	}
	if len(all) < 10 {
		t.Fatalf("only %d alerts", len(all))
	}
	return all
}

// queries are those of the dashboard, with Grafana's variables filled in.
func queries(t *testing.T) []string {
	t.Helper()
	var dashboard struct {
		Panels []struct {
			Targets []struct {
				Expr string `json:"expr"`
			} `json:"targets"`
		} `json:"panels"`
	}
	decode(t, chart+"/files/dashboard.json", &dashboard)
	var all []string
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			all = append(all, strings.NewReplacer("$__rate_interval", "5m", "$namespace", namespace).Replace(target.Expr))
		}
	}
	if len(all) < 15 {
		t.Fatalf("only %d queries", len(all))
	}
	return all
}

// selected are the metrics that an expression asks for; each must be asked of one namespace.
func selected(t *testing.T, expr string) []string {
	t.Helper()
	parsed, err := parser.ParseExpr(expr)
	if err != nil {
		t.Errorf("%s: %v", expr, err)
		return nil
	}
	var metrics []string
	parser.Inspect(parsed, func(node parser.Node, _ []parser.Node) error {
		if selector, ok := node.(*parser.VectorSelector); ok {
			metrics = append(metrics, selector.Name)
			here := false
			for _, m := range selector.LabelMatchers {
				here = here || m.Name == "namespace" && m.Type == labels.MatchEqual && m.Value == namespace
			}
			if !here {
				t.Errorf("%s is not about the release's namespace", expr)
			}
		}
		return nil
	})
	return metrics
}

func TestAlertsAndDashboardAskForWhatARunningOperatorExports(t *testing.T) {
	exported := families(t)
	stored := names(exported)
	check := func(what, expr string) {
		for _, metric := range selected(t, expr) {
			if !stored[metric] {
				t.Errorf("%s: no operator exports %s", what, metric)
			}
		}
	}
	for _, rule := range rules(t) {
		check(rule.Alert, rule.Expr)
	}
	for _, query := range queries(t) {
		check("dashboard", query)
	}
	docs := read(t, root+"/docs/monitoring.md")
	for name := range stored {
		name = regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
		if !regexp.MustCompile("`" + name + "[`{]").MatchString(docs) {
			t.Errorf("docs/monitoring.md lacks %s", name)
		}
	}
}

func TestEachAlertSaysWhatToDoAndWhereToReadOn(t *testing.T) {
	monitoring, troubleshooting := read(t, root+"/docs/monitoring.md"), read(t, root+"/docs/troubleshooting.md")
	const at = "https://wiki.example.com/gemini"
	runbooks := rules(t, "--set", "monitoring.prometheusRule.runbookURL="+at)
	for i, rule := range rules(t) {
		if s := rule.Labels["severity"]; s != "critical" && s != "warning" {
			t.Errorf("%s: severity %q", rule.Alert, s)
		}
		for _, annotation := range []string{"summary", "description"} {
			if rule.Annotations[annotation] == "" {
				t.Errorf("%s: no %s", rule.Alert, annotation)
			}
		}
		if rule.Labels["namespace"] != namespace {
			t.Errorf("%s: of the namespace %q", rule.Alert, rule.Labels["namespace"])
		}
		if url, there := rule.Annotations["runbook_url"]; there {
			t.Errorf("%s: nobody has said where the runbook is, and it is %s", rule.Alert, url)
		}
		if url := runbooks[i].Annotations["runbook_url"]; url != at+"#"+strings.ToLower(rule.Alert) {
			t.Errorf("%s: runbook_url %s", rule.Alert, url)
		}
		if !strings.Contains(troubleshooting, "\n### "+rule.Alert+"\n") {
			t.Errorf("docs/troubleshooting.md has no section %s", rule.Alert)
		}
		if !strings.Contains(monitoring, "`"+rule.Alert+"`") {
			t.Errorf("docs/monitoring.md lacks %s", rule.Alert)
		}
	}
}

// Series over 12 hours, in steps of a minute: for each alert those for which it is true at the end, and those for
// which it is not.
var cases = map[string]struct{ fires, quiet []string }{
	"GeminiBatchNoLeader": {
		[]string{"", `gemini_batch_leader{P} 0x720`},
		[]string{`gemini_batch_leader{P} 1x720` + "\n" + `gemini_batch_leader{Q} 0x720`},
	},
	"GeminiBatchWatchFailing":          counter("gemini_batch_watch_errors_total{P}"),
	"GeminiBatchCrdOutdated":           gauge("gemini_batch_crd_outdated{P}", "1", "0"),
	"GeminiBatchSubmissionUnconfirmed": gauge("gemini_batch_unconfirmed_jobs{P}", "2", "0"),
	"GeminiBatchRunsLong":              gauge("gemini_batch_oldest_batch_seconds{P}", "130000", "129000"),
	"GeminiBatchResultsUncollected":    gauge("gemini_batch_uncollected_jobs{P}", "1", "0"),
	"GeminiBatchResultsExpire":         gauge("gemini_batch_oldest_uncollected_seconds{P}", "130000", "129000"),
	"GeminiBatchQuotaWait": {
		[]string{`gemini_batch_queued_jobs{P,reason="WaitingForQuota"} 3x720`},
		[]string{`gemini_batch_queued_jobs{P,reason="WaitingForSlot"} 3x720`, `gemini_batch_queued_jobs{P,reason="WaitingForQuota"} 0x720`},
	},
	"GeminiBatchOrphaned":       counter("gemini_batch_orphaned_total{P}"),
	"GeminiBatchUnknownBatches": gauge("gemini_batch_unknown_batches{P}", "1", "0"),
	"GeminiBatchDuplicate":      counter("gemini_batch_duplicates_healed_total{P}"),
	"GeminiBatchReceiverDown": {
		[]string{"", `gemini_batch_callback_keyring_keys{P} 0x720`},
		[]string{`gemini_batch_callback_keyring_keys{P} 1x720`},
	},
	"GeminiBatchCallbacksMissing": {
		[]string{
			`gemini_batch_ends_learned_total{P,by="sweep"} 0+1x720` + "\n" + `gemini_batch_ends_learned_total{P,by="callback"} 0+1x720`,
			`gemini_batch_ends_learned_total{P,by="sweep"} 0+1x720`,
		},
		[]string{
			`gemini_batch_ends_learned_total{P,by="sweep"} 0+1x720` + "\n" + `gemini_batch_ends_learned_total{P,by="callback"} 0+9x720`,
			// Too few to tell.
			`gemini_batch_ends_learned_total{P,by="sweep"} 0x700 1x19`,
			// A cancellation of our own waits for no callback.
			`gemini_batch_ends_learned_total{P,by="cancellation"} 0+1x720`,
			"",
		},
	},
	"GeminiBatchCallbacksRefused": {
		[]string{`gemini_batch_callbacks_total{P,outcome="bad_signature",scheme="v1a"} 0+1x720`, `gemini_batch_callbacks_total{P,outcome="jwt_audience",scheme="jwt"} 0+1x720`},
		[]string{`gemini_batch_callbacks_total{P,outcome="token_malformed",scheme="none"} 0+1x720`, `gemini_batch_callbacks_total{P,outcome="accepted",scheme="v1a"} 0+1x720`},
	},
	"GeminiBatchCallbacksNotStored": {
		[]string{`gemini_batch_callbacks_total{P,outcome="write_failed",scheme="v1a"} 0+1x720`},
		[]string{`gemini_batch_callbacks_total{P,outcome="throttled",scheme="v1a"} 0+1x720`},
	},
	"GeminiBatchKeyRingRestored": counter("gemini_batch_callback_keyring_restored_total{P}"),
}

func gauge(series, fires, quiet string) struct{ fires, quiet []string } {
	// The second replica does not lead, and says 0 of everything.
	other := "\n" + strings.Replace(series, "P", "Q", 1) + " 0x720"
	return struct{ fires, quiet []string }{[]string{series + " " + fires + "x720" + other}, []string{series + " " + quiet + "x720" + other, ""}}
}

func counter(series string) struct{ fires, quiet []string } {
	return struct{ fires, quiet []string }{[]string{series + " 0+1x720"}, []string{series + " 7x720", ""}}
}

func TestEachAlertFiresWhenItShallAndOnlyThen(t *testing.T) {
	engine := promqltest.NewTestEngine(t, false, 0, promqltest.DefaultMaxSamplesPerQuery)
	end := time.Unix(0, 0).Add(12 * time.Hour)
	fires := func(t *testing.T, expr, series string) bool {
		here := `namespace="` + namespace + `",pod="p"`
		series = strings.NewReplacer("{P", "{"+here, "{Q", "{"+strings.Replace(here, `"p"`, `"q"`, 1)).Replace(series)
		load := "load 1m"
		for line := range strings.Lines(series) {
			load += "\n  " + strings.TrimSpace(line)
		}
		storage := promqltest.LoadedStorage(t, load)
		defer storage.Close()
		query, err := engine.NewInstantQuery(t.Context(), storage, promql.NewPrometheusQueryOpts(false, 0), expr, end)
		if err != nil {
			t.Fatal(err)
		}
		defer query.Close()
		vector, err := query.Exec(t.Context()).Vector()
		if err != nil {
			t.Fatal(err)
		}
		return len(vector) > 0
	}
	var tested []string
	for _, rule := range rules(t) {
		tested = append(tested, rule.Alert)
		t.Run(rule.Alert, func(t *testing.T) {
			of, ok := cases[rule.Alert]
			if !ok {
				t.Fatal("has no case")
			}
			for _, series := range of.fires {
				if !fires(t, rule.Expr, series) {
					t.Errorf("does not fire: %q", series)
				}
			}
			for _, series := range of.quiet {
				if fires(t, rule.Expr, series) {
					t.Errorf("fires: %q", series)
				}
			}
		})
	}
	if sort.Strings(tested); len(tested) != len(cases) {
		t.Errorf("%d cases for the alerts %v", len(cases), tested)
	}
}
