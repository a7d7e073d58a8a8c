// What tools that know nothing of this operator think of its objects: by kstatus, by the Lua of Argo CD, the CEL of
// Flux and the conditions of Argo Workflows, as examples/dependents has them.
//
// The objects come from a real API server (tests/operator/dependents.rs writes them to $GBO_DEPENDENT_OBJECTS), what
// is expected stands in docs/dependents.md.
package dependents

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

const root = "../.."

// Each column of the table in the documentation, and who fills it.
var columns = map[string]func(*testing.T, *unstructured.Unstructured) string{
	"kstatus":        kstatus,
	"Argo CD":        argoCD,
	"Flux":           flux,
	"Argo Workflows": argoWorkflows,
}

func TestObjectsAreWhatTheDocumentationSays(t *testing.T) {
	header, rows := table(t)
	for name := range columns {
		if !slices.Contains(header, name) {
			t.Errorf("the table in docs/dependents.md has no column %q", name)
		}
	}
	documented := map[string]bool{}
	for _, row := range rows {
		name := row[0]
		documented[name+".json"] = true
		t.Run(name, func(t *testing.T) {
			object := object(t, name)
			for i, title := range header {
				judge, ok := columns[title]
				if !ok {
					continue // words for people
				}
				if got, want := judge(t, object), row[i]; got != want {
					t.Errorf("%s: got %s, docs/dependents.md says %s", title, got, want)
				}
			}
		})
	}
	files, err := os.ReadDir(objects(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if !documented[file.Name()] {
			t.Errorf("docs/dependents.md has no row for %s", file.Name())
		}
	}
}

// The first table with a column kstatus: its header and its rows, without backquotes.
func table(t *testing.T) (header []string, rows [][]string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "docs", "dependents.md"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") {
			if rows != nil {
				return header, rows
			}
			header = nil
			continue
		}
		var cells []string
		for cell := range strings.SplitSeq(strings.Trim(line, "|"), "|") {
			cells = append(cells, strings.Trim(cell, " `"))
		}
		switch {
		case header == nil:
			header = cells
		case slices.Contains(header, "kstatus") && !strings.HasPrefix(cells[0], "---"):
			if len(cells) != len(header) {
				t.Fatalf("docs/dependents.md: a row with %d cells of %d: %s", len(cells), len(header), line)
			}
			rows = append(rows, cells)
		}
	}
	if rows == nil {
		t.Fatal("docs/dependents.md has no table with a column kstatus")
	}
	return header, rows
}

func objects(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("GBO_DEPENDENT_OBJECTS")
	if dir == "" {
		t.Fatal("GBO_DEPENDENT_OBJECTS is not set: run `make test-dependents`")
	}
	return dir
}

// Numbers are int64, as they are in a controller.
func object(t *testing.T, name string) *unstructured.Unstructured {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(objects(t), name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	object := &unstructured.Unstructured{}
	if err := object.UnmarshalJSON(content); err != nil {
		t.Fatal(err)
	}
	return object
}

// One YAML document of the examples.
func example(t *testing.T, name string, into any) {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(root, "examples", "dependents", name))
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(content, into); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

func asJSON(t *testing.T, object *unstructured.Unstructured) []byte {
	t.Helper()
	content, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func kstatus(t *testing.T, object *unstructured.Unstructured) string {
	t.Helper()
	result, err := status.Compute(object)
	if err != nil {
		t.Fatal(err)
	}
	return result.Status.String()
}
