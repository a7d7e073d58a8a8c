package charttest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// Each file of values is a way to run the chart.
func matrix(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("values/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no values: %v", err)
	}
	return files
}

// A GitOps tool would never be done with a chart that renders differently each time; a server-side dry run passes
// defaulting, validation and admission.
func TestEachWayToRunItIsLintedTheSameEachTimeAndAcceptedByTheAPIServer(t *testing.T) {
	for _, values := range matrix(t) {
		t.Run(filepath.Base(values), func(t *testing.T) {
			if _, err := output(helm("lint", "--strict", chart, "--values", values, "--namespace", namespace)); err != nil {
				t.Error(err)
			}
			rendered := template(t, "--values", values)
			if again := template(t, "--values", values); again != rendered {
				t.Error("rendered twice, it differs")
			}
			// Hooks are not applied with the rest; the account of the test's pod would not be there.
			if said, err := dryRun(template(t, "--values", values, "--no-hooks")); err != nil || said != "" {
				t.Errorf("%v %s", err, said)
			}
		})
	}
}

// dryRun has the API server check objects as if they were applied, and returns its warnings.
func dryRun(objects string) (string, error) {
	apply := kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-")
	apply.Stdin = strings.NewReader(objects)
	var stderr strings.Builder
	apply.Stderr = &stderr
	err := apply.Run()
	return stderr.String(), err
}

// The check above is only as good as the API server's warnings.
func TestTheAPIServerWarnsOfPodsThatAreNotRestricted(t *testing.T) {
	said, err := dryRun(`{apiVersion: apps/v1, kind: Deployment, metadata: {name: x, namespace: ` + namespace + `}, spec: {selector: {matchLabels: {a: b}},
template: {metadata: {labels: {a: b}}, spec: {containers: [{name: c, image: i}]}}}}`)
	if err != nil || !strings.Contains(said, "would violate PodSecurity \"restricted") {
		t.Errorf("%v %s", err, said)
	}
}

// The program reads its flags before it looks for Kubernetes, of which it finds none here.
func TestTheOperatorTakesItsFlags(t *testing.T) {
	const taken = "no Kubernetes to talk to"
	for _, values := range matrix(t) {
		ran := map[string]int{}
		for _, document := range strings.Split(template(t, "--values", values), "\n---\n") {
			type pod struct {
				Containers []struct{ Args []string }
			}
			var object struct {
				Kind string
				Spec struct {
					pod
					Template struct{ Spec pod }
				}
			}
			if err := yaml.Unmarshal([]byte(document), &object); err != nil {
				t.Fatal(err)
			}
			for _, container := range append(object.Spec.Containers, object.Spec.Template.Spec.Containers...) {
				ran[object.Kind]++
				program := exec.Command(operatorBin, container.Args...)
				program.Env = []string{"HOME=" + t.TempDir(), "GBO_NAMESPACE=" + namespace}
				said, err := program.CombinedOutput()
				if err == nil || !strings.Contains(string(said), taken) {
					t.Errorf("%s: %s: %v\n%s", values, strings.Join(program.Args, " "), err, said)
				}
			}
		}
		if ran["Deployment"] == 0 || ran["Pod"] == 0 {
			t.Errorf("%s: of %v something was run only", values, ran)
		}
	}
}

// Of a release's name Helm allows 53 characters, of a Service's the API server 63.
func TestLongNamesAreCut(t *testing.T) {
	release := strings.Repeat("r", 53)
	named := 0
	for _, values := range matrix(t) {
		for _, override := range []string{"", strings.Repeat("f", 63)} {
			rendered, err := output(helm("template", release, chart, "--namespace", namespace, "--no-hooks", "--values", values,
				"--set", "fullnameOverride="+override+",monitoring.serviceMonitor.enabled=true,monitoring.podMonitor.enabled=false"))
			if err != nil {
				t.Fatal(err)
			}
			if said, err := dryRun(string(rendered)); err != nil || said != "" {
				t.Errorf("%s: %v %s", values, err, said)
			}
			for _, document := range strings.Split(string(rendered), "\n---\n") {
				var object struct {
					Kind     string
					Metadata struct{ Name, Namespace string }
				}
				if err := yaml.Unmarshal([]byte(document), &object); err != nil {
					t.Fatal(err)
				}
				// Objects without a namespace begin with it and a dot.
				name := strings.TrimPrefix(object.Metadata.Name, namespace+".")
				if strings.HasPrefix(name, "rrr") || strings.HasPrefix(name, "fff") {
					named++
				}
				if object.Kind != "CustomResourceDefinition" && len(name) > 63 {
					t.Errorf("%s: %s %s has %d characters", values, object.Kind, name, len(name))
				}
			}
		}
	}
	if named == 0 {
		t.Error("nothing is named after the release")
	}
}

// A Deployment's selector can't be changed: with the version in it, no upgrade would be possible.
func TestSelectorsContainNoVersion(t *testing.T) {
	selectors := 0
	for _, values := range matrix(t) {
		for _, document := range strings.Split(template(t, "--values", values), "\n---\n") {
			var object map[string]any
			if err := yaml.Unmarshal([]byte(document), &object); err != nil {
				t.Fatal(err)
			}
			spec, _ := object["spec"].(map[string]any)
			selector, ok := spec["selector"].(map[string]any)
			if !ok {
				continue
			}
			selectors++
			for label := range leafSet(selector) {
				if strings.HasSuffix(label, "/version") || strings.HasSuffix(label, "/chart") || strings.HasSuffix(label, "managed-by") {
					t.Errorf("%s: %v selects by %s", values, object["kind"], label)
				}
			}
		}
	}
	if selectors == 0 {
		t.Error("nothing selects anything")
	}
}

func leafSet(values map[string]any) map[string]bool {
	set := map[string]bool{}
	for key, value := range values {
		if inner, ok := value.(map[string]any); ok {
			for leaf := range leafSet(inner) {
				set[leaf] = true
			}
		} else {
			set[key] = true
		}
	}
	return set
}

func TestWhatIsWrongIsRefusedWithWhatToSet(t *testing.T) {
	for name, refused := range map[string]struct {
		set  []string
		says string
	}{
		"unknown value":            {[]string{"noSuchValue=1"}, "noSuchValue"},
		"unknown monitoring value": {[]string{"monitoring.serviceMonitor.noSuchValue=1"}, "noSuchValue"},
		"one account for both": {
			[]string{"controller.serviceAccount.name=x", "receiver.serviceAccount.name=x"},
			"receiver.serviceAccount.name must differ",
		},
		"no URL": {[]string{"receiver.externalURL="}, "receiver.externalURL is missing"},
		"an http URL": {
			[]string{"receiver.externalURL=http://callbacks.example.com"}, "receiver.allowInsecureURL=true",
		},
		"a URL without a host":    {[]string{"receiver.externalURL=https://"}, "must name a host"},
		"a URL with a query":      {[]string{"receiver.externalURL=https://x/?a=b"}, "must name a host"},
		"a lease that overlaps":   {[]string{"lease.seconds=5"}, "less than lease.seconds"},
		"a grace that is no use":  {[]string{"resendGraceSeconds=190"}, "more than 180 + lease.seconds"},
		"Gemini in the clear":     {[]string{"gemini.baseURL=http://x"}, "gemini.allowInsecure=true"},
		"an endpoint with a path": {[]string{"objectStores.endpoints={https://x/y}"}, "objectStores"},
		"a directory that leads up": {
			[]string{"objectStores.mappedDirectories[0].name=..", "objectStores.mappedDirectories[0].volume.emptyDir.medium=Memory"},
			"mappedDirectories",
		},
		"a credential of nobody": {[]string{"defaultCredential.namespaces={a}"}, "defaultCredential.secretName"},
		"several namespaces, and no name of the cluster": {
			[]string{"watchNamespaces={a}"}, "clusterID is missing",
		},
		"a pattern of namespaces": {[]string{"watchNamespaces={team-*}", "clusterID=c"}, "watchNamespaces"},
		"a route that belongs to no Gateway": {
			[]string{"receiver.httpRoute.enabled=true"}, "receiver.httpRoute.parentRefs is missing",
		},
		"a certificate of nobody": {
			[]string{"receiver.tls.certManager.enabled=true"}, "receiver.tls.secretName",
		},
		"a label that selects pods": {[]string{`podLabels.app\.kubernetes\.io/name=x`}, "may not have app.kubernetes.io/name"},
		"two audiences in one":      {[]string{`receiver.audience={a\,b}`}, "audience"},
		"a runbook that nobody finds": {
			[]string{"monitoring.prometheusRule.runbookURL=docs/troubleshooting.md"}, "runbookURL",
		},
		"both monitors": {
			[]string{"monitoring.serviceMonitor.enabled=true", "monitoring.podMonitor.enabled=true"},
			"Set one of them to false",
		},
	} {
		t.Run(name, func(t *testing.T) {
			args := []string{"template", "gbo", chart, reachable}
			for _, set := range refused.set {
				args = append(args, "--set", set)
			}
			// Not the error of output(), which holds the command line and with it what was set.
			var said strings.Builder
			command := helm(args...)
			command.Stderr = &said
			if command.Run() == nil {
				t.Fatal("it is accepted")
			}
			if !strings.Contains(said.String(), refused.says) {
				t.Errorf("it does not say %q: %s", refused.says, said.String())
			}
		})
	}
}

// reachable is the one value that has no default.
const reachable = "--set=receiver.externalURL=https://callbacks.example.com"

// objects are what is rendered, by kind and name without the release's prefix.
func objects(t *testing.T, args ...string) map[string]map[string]any {
	t.Helper()
	found := map[string]map[string]any{}
	for _, document := range strings.Split(template(t, args...), "\n---\n") {
		var object map[string]any
		if err := yaml.Unmarshal([]byte(document), &object); err != nil {
			t.Fatal(err)
		}
		if metadata, ok := object["metadata"].(map[string]any); ok {
			name := fmt.Sprint(object["kind"], " ", metadata["name"])
			if namespaced := metadata["namespace"]; namespaced != nil && namespaced != namespace {
				name += fmt.Sprint(" in ", namespaced)
			}
			found[name] = object
		}
	}
	return found
}

func has(objects map[string]map[string]any, part string) bool {
	for name := range objects {
		if strings.Contains(name, part) {
			return true
		}
	}
	return false
}

// What faces the internet has no business with users' files.
func TestOnlyTheControllerSeesMappedDirectories(t *testing.T) {
	mounted := map[string]bool{}
	for _, document := range strings.Split(template(t, "--values", "values/everything.yaml"), "\n---\n") {
		var object struct {
			Kind     string
			Metadata struct{ Name string }
		}
		if err := yaml.Unmarshal([]byte(document), &object); err != nil {
			t.Fatal(err)
		}
		if object.Kind == "Deployment" {
			mounted[object.Metadata.Name] = strings.Contains(document, "mountPath: \"/mapped/shared\"")
		}
	}
	if len(mounted) != 2 || !mounted["batches-controller"] || mounted["batches-receiver"] {
		t.Error(mounted)
	}
}

func TestWithoutCallbacksNothingReceives(t *testing.T) {
	for values, receives := range map[string]bool{"default": true, "callbacks-off": false} {
		rendered := objects(t, "--values", "values/"+values+".yaml")
		for _, part := range []string{
			"Deployment gbo-gemini-batch-operator-receiver", "Service gbo-gemini-batch-operator-receiver",
			"ServiceAccount gbo-gemini-batch-operator-receiver", "ValidatingAdmissionPolicy", "-receiver",
		} {
			if has(rendered, part) != receives {
				t.Errorf("%s: %s is rendered: %v", values, part, !receives)
			}
		}
		args := fmt.Sprint(rendered["Deployment gbo-gemini-batch-operator-controller"])
		if strings.Contains(args, "--external-url=") != receives || !strings.Contains(args, "--role=controller") {
			t.Errorf("%s: %s", values, args)
		}
	}
	rendered := objects(t, reachable, "--set=callbacks=false,receiver.ingress.enabled=true,receiver.httpRoute.enabled=true")
	if has(rendered, "Ingress") || has(rendered, "HTTPRoute") {
		t.Error("nothing is there that could be exposed")
	}
}

func TestWithNamedNamespacesNobodyHasAClusterRole(t *testing.T) {
	rendered := objects(t, "--values", "values/scoped.yaml")
	if has(rendered, "ClusterRole") {
		t.Errorf("a ClusterRole: %v", rendered)
	}
	for _, team := range []string{"team-a", "team-b"} {
		for _, half := range []string{"controller", "receiver"} {
			for _, kind := range []string{"Role", "RoleBinding"} {
				if !has(rendered, fmt.Sprintf("%s %s.gbo-gemini-batch-operator-%s in %s", kind, namespace, half, team)) {
					t.Errorf("the %s has no %s in %s", half, kind, team)
				}
			}
		}
	}
	args := fmt.Sprint(rendered["Deployment gbo-gemini-batch-operator-controller"])
	for _, flag := range []string{
		"--watch-namespaces=team-a,team-b", "--cluster-id=prod-eu", "--default-credential-secret=gemini", "--default-credential-namespaces=team-a",
	} {
		if !strings.Contains(args, flag) {
			t.Errorf("%s is missing: %s", flag, args)
		}
	}
}

// YAML would take them for numbers, which the API server refuses.
func TestNamesMayBeNumbers(t *testing.T) {
	rendered, err := output(helm("template", "2024", chart, "--namespace", "5678", "--values", "values/everything.yaml",
		reachable, "--set", "receiver.ingress.enabled=true,receiver.ingress.certManager.enabled=true,"+
			"receiver.ingress.certManager.issuerRef.kind=Issuer,monitoring.prometheusRule.enabled=true",
		"--set-string", "nameOverride=1,fullnameOverride=2,clusterID=3,watchNamespaces={4},image.tag=5,keyRing.secretName=6,lease.name=7,"+
			"defaultCredential.secretName=8,receiver.ingress.className=9,receiver.ingress.tlsSecretName=10,receiver.tls.secretName=11,"+
			"controller.serviceAccount.name=12,receiver.serviceAccount.name=13,priorityClassName=14,defaultCredential.secretKey=15,"+
			"defaultCredential.namespaces={16}"))
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"Ingress", "Certificate", "ValidatingAdmissionPolicyBinding", "Role"} {
		if !strings.Contains(string(rendered), "\nkind: "+kind+"\n") {
			t.Errorf("no %s is rendered", kind)
		}
	}
	for _, document := range strings.Split(string(rendered), "\n---\n") {
		var object any
		if err := yaml.Unmarshal([]byte(document), &object); err != nil {
			t.Fatalf("%v in:\n%s", err, document)
		}
		noNumbers(t, "", object, document)
	}
}

func noNumbers(t *testing.T, key string, value any, document string) {
	switch value := value.(type) {
	case map[string]any:
		for name, inner := range value {
			if key == "labels" || key == "matchLabels" || key == "selector" && name != "matchLabels" {
				name = "name"
			}
			noNumbers(t, name, inner, document)
		}
	case []any:
		for _, inner := range value {
			noNumbers(t, key, inner, document)
		}
	case string, bool:
	default:
		if key := strings.TrimSuffix(strings.ToLower(key), "s"); strings.HasSuffix(key, "name") || key == "namespace" || key == "arg" {
			t.Errorf("%s is %v (%T) in:\n%s", key, value, value, document)
		}
	}
}

func TestCombinedThereIsOneOfEach(t *testing.T) {
	rendered := objects(t, "--values", "values/combined.yaml")
	for name, there := range map[string]bool{
		"Deployment gbo-gemini-batch-operator-controller": true, "Deployment gbo-gemini-batch-operator-receiver": false,
		"ServiceAccount gbo-gemini-batch-operator-receiver": false, "ValidatingAdmissionPolicy": false,
		"PodDisruptionBudget": false, "Service gbo-gemini-batch-operator-receiver": true,
	} {
		if has(rendered, name) != there {
			t.Errorf("%s: %v", name, !there)
		}
	}
	service := fmt.Sprint(rendered["Service gbo-gemini-batch-operator-receiver"])
	if !strings.Contains(service, "app.kubernetes.io/component:controller") || !strings.Contains(service, "port:443") {
		t.Error(service)
	}
	args := fmt.Sprint(rendered["Deployment gbo-gemini-batch-operator-controller"])
	for _, flag := range []string{"--role=all", "--tls-cert-file=/tls/tls.crt", "--lease-name=", "--listen="} {
		if !strings.Contains(args, flag) {
			t.Errorf("%s is missing: %s", flag, args)
		}
	}
}

// What an uninstallation must leave, and an upgrade must reach.
func TestTheDefinitionIsKeptAndTheOneOfTheOperator(t *testing.T) {
	crd := objects(t, reachable)["CustomResourceDefinition geminibatchjobs.geminibatch.dev"]
	metadata, _ := crd["metadata"].(map[string]any)
	if !strings.Contains(fmt.Sprint(metadata["annotations"]), "helm.sh/resource-policy:keep") {
		t.Errorf("it goes when the chart goes: %v", metadata)
	}
	var standalone map[string]any
	decode(t, "../../crds/geminibatchjobs.yaml", &standalone)
	if fmt.Sprint(crd["spec"]) != fmt.Sprint(standalone["spec"]) {
		t.Error("it is not the one of crds/")
	}
	if has(objects(t, reachable, "--set=crds.install=false"), "CustomResourceDefinition") {
		t.Error("it is rendered unasked")
	}
}

func TestTheInternetReachesCallbacksOnly(t *testing.T) {
	ingress := fmt.Sprint(objects(t, "--values", "values/ingress.yaml")["Ingress gbo-gemini-batch-operator-receiver"])
	if !strings.Contains(ingress, "path:/gemini/v1/callbacks pathType:Prefix") || !strings.Contains(ingress, "host:callbacks.example.com") {
		t.Error(ingress)
	}
	route := fmt.Sprint(objects(t, "--values", "values/http-route.yaml")["HTTPRoute gbo-gemini-batch-operator-receiver"])
	if !strings.Contains(route, "type:PathPrefix value:/v1/callbacks") || !strings.Contains(route, "hostnames:[callbacks.example.com]") {
		t.Error(route)
	}
}

func TestWhoIsLetInAndOut(t *testing.T) {
	if has(objects(t, reachable), "NetworkPolicy") {
		t.Error("rendered unasked")
	}
	const policy = "NetworkPolicy gbo-gemini-batch-operator-receiver"
	anywhere := fmt.Sprint(objects(t, reachable, "--set=networkPolicy.enabled=true")[policy])
	if !strings.Contains(anywhere, "ingress:[map[ports:[map[port:admin]]] map[ports:[map[port:callbacks]]]]") {
		t.Error(anywhere)
	}
	rendered := objects(t, "--values", "values/everything.yaml")
	for half, callbacks := range map[string]bool{"controller": false, "receiver": true} {
		var spec struct {
			Ingress []struct {
				From  []map[string]any
				Ports []struct{ Port string }
			}
			Egress []struct{ Ports []struct{ Port int } }
		}
		object, err := yaml.Marshal(rendered["NetworkPolicy batches-"+half]["spec"])
		if err != nil {
			t.Fatal(err)
		}
		if err := yaml.Unmarshal(object, &spec); err != nil {
			t.Fatal(err)
		}
		from := map[string]string{}
		for _, rule := range spec.Ingress {
			from[rule.Ports[0].Port] = fmt.Sprint(rule.From)
			if !strings.Contains(from[rule.Ports[0].Port], "app.kubernetes.io/component:test") {
				t.Errorf("%s: helm test does not reach the port %s", half, rule.Ports[0].Port)
			}
		}
		if admin := from["admin"]; !strings.Contains(admin, "app:prometheus") || !strings.Contains(admin, "cidr:10.0.0.0/8") {
			t.Errorf("%s: metrics are read from %s", half, admin)
		}
		if _, there := from["callbacks"]; there != callbacks || there && !strings.Contains(from["callbacks"], "ingress-nginx") {
			t.Errorf("%s: callbacks come from %q", half, from["callbacks"])
		}
		if ports := fmt.Sprint(spec.Egress); ports != "[{[{53} {53}]} {[{443} {6443}]} {[{8787}]} {[{5353}]}]" {
			t.Errorf("%s: what is let out: %s", half, ports)
		}
	}
}

func TestTheValuesInTheDocsAreAccepted(t *testing.T) {
	blocks := regexp.MustCompile("(?s)\n```yaml\n(.*?)```\n").FindAllStringSubmatch(read(t, root+"/docs/install.md"), -1)
	kinds := map[string]bool{}
	for _, block := range blocks {
		values := filepath.Join(t.TempDir(), "values.yaml")
		if err := os.WriteFile(values, []byte(block[1]), 0o600); err != nil {
			t.Fatal(err)
		}
		rendered := template(t, "--values", values, "--no-hooks")
		if said, err := dryRun(rendered); err != nil || said != "" {
			t.Errorf("%v %s\n%s", err, said, block[1])
		}
		for _, kind := range []string{"Ingress", "HTTPRoute", "type: LoadBalancer", "Certificate", "NetworkPolicy"} {
			kinds[kind] = kinds[kind] || strings.Contains(rendered, "\nkind: "+kind+"\n") || strings.Contains(rendered, "  "+kind+"\n")
		}
	}
	if len(kinds) == 0 {
		t.Error("the docs show no values")
	}
	for kind, shown := range kinds {
		if !shown {
			t.Errorf("docs/install.md does not show %s", kind)
		}
	}
}

func TestMonitoringIsOptIn(t *testing.T) {
	kinds := regexp.MustCompile(`(?m)^kind: (ServiceMonitor|PodMonitor|PrometheusRule|ConfigMap)$`)
	if found := kinds.FindAllString(template(t, reachable), -1); found != nil {
		t.Errorf("rendered unasked: %v", found)
	}
	for value, kind := range map[string]string{
		"serviceMonitor": "ServiceMonitor", "podMonitor": "PodMonitor", "prometheusRule": "PrometheusRule", "dashboard": "ConfigMap",
	} {
		found := kinds.FindAllString(template(t, reachable, "--set", "monitoring."+value+".enabled=true"), -1)
		if fmt.Sprint(found) != "[kind: "+kind+"]" {
			t.Errorf("monitoring.%s.enabled renders %v", value, found)
		}
	}
}

func TestEveryValueIsExplainedInTheREADME(t *testing.T) {
	var values map[string]any
	decode(t, chart+"/values.yaml", &values)
	readme := read(t, chart+"/README.md")
	for _, path := range leaves("", values) {
		row := regexp.MustCompile("(?m)^\\| `" + regexp.QuoteMeta(path) + "` \\|[^|]*\\| *(.*?) *\\|$").FindStringSubmatch(readme)
		if row == nil {
			t.Errorf("%s is not documented", path)
		} else if row[1] == "" {
			t.Errorf("nothing is said of %s", path)
		}
	}
}

// leaves are the paths of all values; an empty map is one.
func leaves(prefix string, values map[string]any) []string {
	var paths []string
	for key, value := range values {
		path := strings.TrimPrefix(prefix+"."+key, ".")
		if inner, ok := value.(map[string]any); ok && len(inner) > 0 {
			paths = append(paths, leaves(path, inner)...)
		} else {
			paths = append(paths, path)
		}
	}
	sort.Strings(paths)
	return paths
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func decode(t *testing.T, path string, into any) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(read(t, path)), into); err != nil {
		t.Fatal(err)
	}
}
