{{- define "fedmezo.name" -}}
{{- printf "%s-fedmezo" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "fedmezo.labels" -}}
app.kubernetes.io/name: fedmezo
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "fedmezo.coordinatorLabels" -}}
app.kubernetes.io/name: fedmezo
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: coordinator
{{- end -}}

{{- define "fedmezo.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: { type: RuntimeDefault }
{{- end -}}

{{- define "fedmezo.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end -}}

{{- define "fedmezo.check" -}}
{{- with .Values.coordinator -}}
{{- if and .standby (not .postgresqlSecret) -}}
{{- fail "coordinator.standby needs coordinator.postgresqlSecret: only a journal in PostgreSQL can change hands" -}}
{{- end -}}
{{- if and .standby (ne .persistence.accessMode "ReadWriteMany") -}}
{{- fail "coordinator.standby needs coordinator.persistence.accessMode ReadWriteMany: both pods need the state folder" -}}
{{- end -}}
{{- if and .runs .postgresqlSecret -}}
{{- fail "coordinator.runs takes no PostgreSQL: each run has a journal of its own on the volume" -}}
{{- end -}}
{{- if and (not .runs) (not .config) -}}
{{- fail "coordinator.config is missing: give the TOML file of one run, or set coordinator.runs" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.metrics.serviceMonitor.enabled (not .Values.metrics.enabled) -}}
{{- fail "metrics.serviceMonitor needs metrics.enabled" -}}
{{- end -}}
{{- if and .Values.metrics.serviceMonitor.enabled (not .Values.metrics.serviceMonitor.secret) -}}
{{- fail "metrics.serviceMonitor.secret is missing: name a secret with metrics.token and ca.pem" -}}
{{- end -}}
{{- end -}}
